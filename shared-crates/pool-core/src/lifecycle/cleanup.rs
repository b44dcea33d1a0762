//! Removal of the records and files that ended workers leave behind.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use super::Lifecycle;
use crate::api::pool::CleanupReport;
use crate::registry::RegistryError;

impl Lifecycle {
    /// Removes the records and logs of all ended workers; a worker whose process is gone counts as ended. Also removes files
    /// that belong to no worker: logs without a record, unreadable records, and files that a killed program left half-written.
    /// Live workers are not touched. Skips workers for which `watched` returns true, as in [`Lifecycle::reconcile`].
    pub fn cleanup(&self, watched: &dyn Fn(&str) -> bool) -> Result<CleanupReport, RegistryError> {
        let reconciled = self.reconcile(watched)?;
        let mut report = CleanupReport {
            reaped: reconciled.ended.into_iter().map(|info| info.id).collect(),
            ..CleanupReport::default()
        };
        // No process starts a worker or writes a record while this lock is held, so unfinished files in the folders are
        // leftovers.
        let locked = self.registry.lock()?;
        let records = locked.load()?.records;
        let ended = records
            .iter()
            .filter(|record| !record.info.status.is_live());
        report.freed_bytes += ended
            .map(|record| {
                size(
                    &self
                        .home
                        .workers_dir()
                        .join(format!("{}.json", record.info.id)),
                )
            })
            .sum::<u64>();
        report.forgotten = locked.prune(&records, 0)?;
        for id in &report.forgotten {
            let log = self.log_file(id);
            report.freed_bytes += size(&log);
            remove(&log)?;
        }
        let live: HashSet<_> = records
            .iter()
            .filter(|record| record.info.status.is_live())
            .map(|record| self.log_file(&record.info.id))
            .collect();
        let logs = self.log_file("any");
        let folders = [
            Some(self.home.workers_dir()),
            logs.parent().map(Path::to_path_buf),
        ];
        for entry in folders
            .into_iter()
            .flatten()
            .filter_map(|folder| fs::read_dir(folder).ok())
            .flatten()
        {
            let Ok(entry) = entry else { continue };
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let left_over = name.starts_with(".write-")
                || name.ends_with(".json.damaged")
                || (name.ends_with(".log") && !live.contains(&path));
            if left_over && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                report.freed_bytes += size(&path);
                remove(&path)?;
                report.files.push(name.into_owned());
            }
        }
        report.files.sort();
        Ok(report)
    }
}

fn size(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |metadata| metadata.len())
}

fn remove(path: &Path) -> Result<(), RegistryError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RegistryError::Io {
            action: "remove",
            path: path.to_path_buf(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PoolConfig;
    use crate::kit::home::Home;
    use crate::lifecycle::tests::record;
    use crate::worker::WorkerStatus;

    #[test] // [POOLD-084]
    fn only_what_nothing_live_needs_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        let lifecycle = Lifecycle::new(home.clone(), PoolConfig::default()).unwrap();
        let logs = lifecycle.log_file("x").parent().unwrap().to_path_buf();
        fs::create_dir_all(&logs).unwrap();
        let mut live = record(0);
        live.info.status = WorkerStatus::Ready;
        let mut ended = record(1);
        ended.info.status = WorkerStatus::Failed;
        // The worker has no process, so it counts as gone.
        let mut lost = record(2);
        lost.info.status = WorkerStatus::Ready;
        for record in [&live, &ended, &lost] {
            lifecycle.registry.lock().unwrap().save(record).unwrap();
            fs::write(lifecycle.log_file(&record.info.id), "a line\n").unwrap();
        }
        fs::write(logs.join("worker-cpu-77.log"), "forgotten\n").unwrap();
        fs::write(home.workers_dir().join(".write-abc"), "half").unwrap();
        fs::write(home.workers_dir().join("worker-cpu-9.json"), "{").unwrap();

        // The live worker is watched.
        let watched = |id: &str| id == "worker-cpu-0";
        let report = lifecycle.cleanup(&watched).unwrap();
        assert_eq!(report.reaped, ["worker-cpu-2"]);
        assert_eq!(report.forgotten, ["worker-cpu-1", "worker-cpu-2"]);
        assert_eq!(
            report.files,
            [
                ".write-abc",
                "worker-cpu-77.log",
                "worker-cpu-9.json.damaged"
            ]
        );
        assert!(report.freed_bytes > 100, "{report:?}");
        let left = |folder: &Path| -> Vec<_> {
            let entries = fs::read_dir(folder).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(left(&home.workers_dir()), ["worker-cpu-0.json"]);
        assert_eq!(left(&logs), ["worker-cpu-0.log"]);
        assert_eq!(
            lifecycle.cleanup(&watched).unwrap(),
            CleanupReport::default()
        );
    }
}
