//! Identity of processes. A pid alone is not enough: the system may reuse it for another process.

use std::io;
use std::time::Duration;

pub use rustix::process::Signal;
use rustix::process::{Pid, getpgid};
use serde::{Deserialize, Serialize};

/// Permanent identity of a process: no other process on this machine, even after a reboot, has the same three values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id, which the system may reuse.
    pub pid: u32,
    /// Start time in the platform's own unit: clock ticks since boot on Linux, seconds since 1970 on macOS.
    pub start_time: u64,
    /// Id of the machine's boot in which the process runs.
    pub boot_id: String,
}

/// Returns the time since the machine's boot, without sleep. The wall clock does not affect it, and all processes of one
/// boot share it.
pub fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(now).unwrap_or_default()
}

/// Outcome of sending a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalOutcome {
    /// The signal was sent.
    Sent,
    /// Nothing was sent, because the process has ended or its pid now belongs to another process.
    Gone,
}

/// The system's data about a pid at one moment.
struct Observed {
    start_time: u64,
    zombie: bool,
}

/// Returns the id of the host's current boot.
pub fn boot_id() -> io::Result<String> {
    platform::boot_id()
}

impl ProcessIdentity {
    /// Returns the identity of this process.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id())?
            .ok_or_else(|| io::Error::other("the system does not list this process"))
    }

    /// Returns the process that currently has `pid`, if any. An ended process whose parent has not waited for it still counts.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let Some(seen) = platform::observe(pid)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            pid,
            start_time: seen.start_time,
            boot_id: platform::boot_id()?,
        }))
    }

    /// Returns whether the process is running; `false` for a zombie, or if that can't be determined.
    pub fn is_alive(&self) -> bool {
        self.runs().unwrap_or(false)
    }

    /// Returns whether the process is running; `false` for a zombie. An error must not be mistaken for the process's end.
    pub fn runs(&self) -> io::Result<bool> {
        Ok(self.observe()?.is_some_and(|seen| !seen.zombie))
    }

    /// Returns whether the process is the leader of a process group.
    pub fn leads_a_group(&self) -> bool {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        pid.is_some_and(|pid| getpgid(Some(pid)) == Ok(pid))
    }

    /// Kills this process, and the process group that it leads, if any. Never kills another process or group.
    pub fn kill_group(&self) -> io::Result<SignalOutcome> {
        platform::kill_group(self)
    }

    /// Sends `signal` to this process, and never to another process with its pid.
    pub fn signal(&self, signal: Signal) -> io::Result<SignalOutcome> {
        platform::signal(self, signal)
    }

    /// Waits until the process has ended; returns `false` after `timeout`. Blocks the thread.
    pub fn wait_gone(&self, timeout: Duration) -> io::Result<bool> {
        platform::wait_gone(self, timeout)
    }

    /// Returns the system's data about *this* process: `None` if the pid is free or belongs to another process.
    fn observe(&self) -> io::Result<Option<Observed>> {
        if platform::boot_id()? != self.boot_id {
            return Ok(None);
        }
        Ok(platform::observe(self.pid)?.filter(|seen| seen.start_time == self.start_time))
    }
}

#[cfg(target_os = "linux")]
mod platform {
    use std::fs;
    use std::io;
    use std::os::fd::OwnedFd;
    use std::time::{Duration, Instant};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::Errno;
    use rustix::process::{
        Pid, PidfdFlags, Signal, getpgid, kill_process_group, pidfd_open, pidfd_send_signal,
    };

    use super::{Observed, ProcessIdentity, SignalOutcome};

    pub fn boot_id() -> io::Result<String> {
        Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
            .trim()
            .to_owned())
    }

    pub fn observe(pid: u32) -> io::Result<Option<Observed>> {
        let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // The process ended between opening and reading the file.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        parse_stat(&stat)
            .map(Some)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown format")))
    }

    /// Parses `pid (command) state ...`, where the command itself may contain spaces and brackets. The state is field 3 and
    /// the start time field 22 of proc_pid_stat(5).
    pub(super) fn parse_stat(stat: &str) -> Option<Observed> {
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Observed {
            start_time,
            zombie: matches!(state, "Z" | "X" | "x"),
        })
    }

    /// Opens a handle on the process. The identity is checked *after* opening: if the pid belongs to the recorded process
    /// then, it also did when the handle was opened, and a handle can't change its process.
    fn open(identity: &ProcessIdentity) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(identity.observe()?.map(|_| handle))
    }

    pub fn signal(identity: &ProcessIdentity, signal: Signal) -> io::Result<SignalOutcome> {
        let Some(handle) = open(identity)? else {
            return Ok(SignalOutcome::Gone);
        };
        match pidfd_send_signal(handle, signal) {
            Ok(()) => Ok(SignalOutcome::Sent),
            Err(Errno::SRCH) => Ok(SignalOutcome::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills the process and the group that it leads. A group is identified by its leader's pid, which is reliable only
    /// while the leader exists. So this stops the leader, so that it can't exit, and checks it again before killing the
    /// group.
    pub fn kill_group(identity: &ProcessIdentity) -> io::Result<SignalOutcome> {
        let Some(handle) = open(identity)? else {
            return Ok(SignalOutcome::Gone);
        };
        let send = |signal| match pidfd_send_signal(&handle, signal) {
            Ok(()) => Ok(SignalOutcome::Sent),
            Err(Errno::SRCH) => Ok(SignalOutcome::Gone),
            Err(error) => Err(io::Error::from(error)),
        };
        let pid = i32::try_from(identity.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid
            && send(Signal::STOP)? == SignalOutcome::Sent
            // On an error, continue with the kill below: returning would leave the leader stopped.
            && identity.runs().unwrap_or(false)
            && getpgid(Some(pid)) == Ok(pid)
        {
            // Processes that we may not signal survive. The leader is killed below in any case.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        send(Signal::KILL)
    }

    pub fn wait_gone(identity: &ProcessIdentity, timeout: Duration) -> io::Result<bool> {
        let Some(handle) = open(identity)? else {
            return Ok(true);
        };
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            // A pidfd becomes readable when its process ends, whether or not the parent has waited for it.
            match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Implementation for macOS, which has no pidfd and no `/proc`. Start times come from `ps`, and the pid could be reused
/// between the check and the signal. Not covered by this project's tests.
#[cfg(target_os = "macos")]
mod platform {
    use std::io;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};

    use super::{Observed, ProcessIdentity, SignalOutcome};

    fn output(program: &str, args: &[&str]) -> io::Result<String> {
        let output = Command::new(program)
            .args(args)
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    pub fn boot_id() -> io::Result<String> {
        output("/usr/sbin/sysctl", &["-n", "kern.bootsessionuuid"])
    }

    pub fn observe(pid: u32) -> io::Result<Option<Observed>> {
        let line = output("/bin/ps", &["-o", "state=,lstart=", "-p", &pid.to_string()])?;
        let Some((state, started)) = line.split_once(' ') else {
            return Ok(None);
        };
        let started = jiff::civil::DateTime::strptime("%a %b %e %H:%M:%S %Y", started.trim())
            .and_then(|time| time.to_zoned(jiff::tz::TimeZone::UTC))
            .map_err(io::Error::other)?;
        let start_time =
            u64::try_from(started.timestamp().as_second()).map_err(io::Error::other)?;
        Ok(Some(Observed {
            start_time,
            zombie: state.starts_with('Z'),
        }))
    }

    pub fn signal(identity: &ProcessIdentity, signal: Signal) -> io::Result<SignalOutcome> {
        let pid = i32::try_from(identity.pid).ok().and_then(Pid::from_raw);
        match (pid, identity.observe()?) {
            (Some(pid), Some(_)) => match kill_process(pid, signal) {
                Ok(()) => Ok(SignalOutcome::Sent),
                Err(rustix::io::Errno::SRCH) => Ok(SignalOutcome::Gone),
                Err(error) => Err(error.into()),
            },
            _ => Ok(SignalOutcome::Gone),
        }
    }

    pub fn kill_group(identity: &ProcessIdentity) -> io::Result<SignalOutcome> {
        let pid = i32::try_from(identity.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid
            && identity.runs()?
            && getpgid(Some(pid)) == Ok(pid)
        {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        signal(identity, Signal::KILL)
    }

    pub fn wait_gone(identity: &ProcessIdentity, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        while identity.is_alive() {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(true)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A real child process that ends with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn identity(&self) -> ProcessIdentity {
            ProcessIdentity::of(self.0.id()).unwrap().unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test] // [POOLCORE-030]
    fn an_identity_follows_its_process_to_the_end() {
        let mut sleeper = Sleeper::start();
        let identity = sleeper.identity();
        assert!(identity.is_alive());
        assert!(!identity.wait_gone(Duration::from_millis(10)).unwrap());

        assert_eq!(identity.signal(Signal::TERM).unwrap(), SignalOutcome::Sent);
        // The child is now a zombie, which counts as gone although its pid is still taken.
        assert!(identity.wait_gone(Duration::from_secs(10)).unwrap());
        assert!(!identity.is_alive());

        sleeper.0.wait().unwrap();
        assert_eq!(identity.signal(Signal::TERM).unwrap(), SignalOutcome::Gone);
        assert!(identity.wait_gone(Duration::ZERO).unwrap());
    }

    #[test] // [POOLCORE-031] [P15]
    fn a_stranger_is_never_signalled() {
        let mut sleeper = Sleeper::start();
        let real = sleeper.identity();
        let strangers = [
            ProcessIdentity {
                start_time: real.start_time + 1,
                ..real.clone()
            },
            ProcessIdentity {
                boot_id: "another-boot".into(),
                ..real.clone()
            },
            ProcessIdentity {
                pid: 0,
                ..real.clone()
            },
            ProcessIdentity {
                pid: u32::MAX,
                ..real.clone()
            },
        ];
        for stranger in strangers {
            assert_eq!(
                stranger.signal(Signal::KILL).unwrap(),
                SignalOutcome::Gone,
                "{stranger:?}"
            );
            assert!(!stranger.is_alive());
        }
        assert!(
            sleeper.0.try_wait().unwrap().is_none(),
            "the process that now has the pid is left alone"
        );
    }

    #[test]
    fn a_command_name_with_brackets_does_not_confuse_the_reader() {
        let stat = "42 (a) b) R) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 1";
        let seen = platform::parse_stat(stat).unwrap();
        assert_eq!((seen.start_time, seen.zombie), (98765, false));
        assert!(platform::parse_stat("42 (short) S 1").is_none());
    }
}
