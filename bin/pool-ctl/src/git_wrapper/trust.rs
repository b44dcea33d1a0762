//! Checks of a repository: addresses, names and paths chosen by others, and settings that name programs.

/// A transport to a remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// `https://`
    Https,
    /// `ssh://`, or `user@host:path`
    Ssh,
    /// `http://`: neither private nor safe from tampering.
    Http,
    /// `git://`: neither private nor safe from tampering.
    Git,
    /// A path on this host.
    File,
    /// `./x` or `../x`: relative to the repository that names it.
    Relative,
}

impl Transport {
    /// Returns git's name for the protocol; `None` for a relative address.
    fn protocol(self) -> Option<&'static str> {
        match self {
            Self::Https => Some("https"),
            Self::Ssh => Some("ssh"),
            Self::Http => Some("http"),
            Self::Git => Some("git"),
            Self::File => Some("file"),
            Self::Relative => None,
        }
    }
}

/// Returns the value of `GIT_ALLOW_PROTOCOL` for a checkout whose own remote is reached by `own`. https and ssh are always
/// allowed, other protocols only if the operator chose them when the checkout was made.
pub fn protocols(own: &[Transport]) -> String {
    let own = own.iter().copied().filter_map(Transport::protocol);
    let mut names = vec!["https", "ssh"];
    for name in own {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(":")
}

/// Returns the transport for the address `url`, or the reason it may not be used.
pub fn transport_of(url: &str) -> Result<Transport, &'static str> {
    if url.is_empty() {
        return Err("has no address");
    }
    if url.len() > 2048 {
        return Err("has an address of over 2048 bytes");
    }
    if url.chars().any(char::is_control) {
        return Err("has control characters in its address");
    }
    if url.starts_with('-') {
        return Err("has an address that looks like an option");
    }
    let word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
    if url.split_once("::").is_some_and(|(helper, _)| word(helper)) {
        return Err("has an address that runs a remote helper");
    }
    if let Some((scheme, rest)) = url.split_once("://") {
        let transport = match scheme.to_ascii_lowercase().as_str() {
            "https" => Transport::Https,
            "ssh" | "git+ssh" | "ssh+git" => Transport::Ssh,
            "http" => Transport::Http,
            "git" => Transport::Git,
            "file" => return Ok(Transport::File),
            _ => return Err("has an address with an unsupported protocol"),
        };
        return check_host(rest.split('/').next().unwrap_or_default()).map(|()| transport);
    }
    if url.starts_with("./") || url.starts_with("../") || url == "." || url == ".." {
        return Ok(Transport::Relative);
    }
    match url.split_once(':') {
        Some((host, _)) if !host.contains('/') => check_host(host).map(|()| Transport::Ssh),
        _ => Ok(Transport::File),
    }
}

fn check_host(authority: &str) -> Result<(), &'static str> {
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    match host {
        "" => Err("has an address without a host"),
        host if host.starts_with('-') || authority.starts_with('-') => {
            Err("has an address whose host looks like an option")
        }
        _ => Ok(()),
    }
}

/// Checks the name of a submodule or remote, which becomes the name of a folder inside `.git`.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("has no name"),
        name if name.len() > 255 => Err("has a name of over 255 bytes"),
        name if name.chars().any(char::is_control) => Err("has control characters in its name"),
        name if name.starts_with('-') => Err("has a name that looks like an option"),
        name if name.starts_with('/') || name.split(['/', '\\']).any(|step| step == "..") => {
            Err("has a name that leads out of its folder")
        }
        _ => Ok(()),
    }
}

/// Checks the path of a submodule inside its checkout.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    let odd = |step: &str| matches!(step, "" | "." | "..") || step.eq_ignore_ascii_case(".git");
    match path {
        "" => Err("has no path"),
        path if path.chars().any(char::is_control) => Err("has control characters in its path"),
        path if path.starts_with('-') => Err("has a path that looks like an option"),
        path if path.starts_with('/') || path.trim_end_matches('/').split('/').any(odd) => {
            Err("has a path that leads out of the checkout or into `.git`")
        }
        _ => Ok(()),
    }
}

/// Checks the name of a branch by git's own rules, as far as they keep it from being taken for anything else.
pub fn check_branch(name: &str) -> Result<(), &'static str> {
    let forbidden =
        |c: char| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
    let odd = |step: &str| step.is_empty() || step.starts_with('.') || step.ends_with(".lock");
    if name.starts_with('-') {
        Err("looks like an option")
    } else if name == "@"
        || name.len() > 255
        || name.contains(forbidden)
        || name.contains("..")
        || name.contains("@{")
        || name.ends_with('.')
        || name.split('/').any(odd)
    {
        Err("is not a valid branch name")
    } else {
        Ok(())
    }
}

/// Returns whether the setting `key` (as git lists it, section and variable in lower case) with `value` makes git run a program
/// or write a file outside the repository in one of the commands used here, in a way that can't be switched off from outside
/// without changing the result. Also returns true if the setting makes git accept any server as the right one.
pub fn reaches_out(key: &str, value: &str) -> bool {
    let (section, rest) = key.split_once('.').unwrap_or((key, ""));
    let variable = rest.rsplit('.').next().unwrap_or(rest);
    match (section, variable) {
        ("filter", "clean" | "smudge" | "process")
        | ("remote", "uploadpack" | "receivepack" | "vcs")
        | ("core", "gitproxy" | "alternaterefscommand")
        | ("gc", "recentobjectshook")
        | ("gpg", "program" | "defaultkeycommand")
        | ("hook", "command")
        // The user's own `git-lfs` filter reads these, and runs the programs that they name.
        | ("lfs", "path" | "clean" | "smudge") => !value.is_empty(),
        // Writes the file that `http.cookieFile` names. With an address in its key, no setting on the command line overrides
        // it.
        ("http", "savecookies") => !is_off(value),
        // Likewise, and the fetched files become code that runs here.
        ("http", "sslverify") => is_off(value),
        // Takes effect once another branch is checked out, which is after all checks.
        ("includeif", "path") => rest.starts_with("onbranch:"),
        // A bare word is a helper installed on this host; anything else is run by a shell.
        ("credential", "helper") => !value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'),
        _ => false,
    }
}

/// Returns whether git reads `value` as false.
fn is_off(value: &str) -> bool {
    let value = value.to_ascii_lowercase();
    matches!(value.as_str(), "false" | "no" | "off" | "0" | "")
}

/// Returns whether the setting `key` decides which proxy is used for a remote, or which certificates are trusted. Companies
/// need both, so these settings are respected, but the user should know that the repository has them.
pub fn is_detour(key: &str) -> bool {
    let (section, rest) = key.split_once('.').unwrap_or((key, ""));
    let variable = rest.rsplit('.').next().unwrap_or(rest);
    matches!(
        (section, variable),
        ("http", "proxy" | "sslcainfo" | "sslcapath") | ("remote", "proxy")
    )
}

/// Returns an address without the user and password before its host.
pub fn without_user(address: &str) -> &str {
    let rest = address.rsplit_once("://").map_or(address, |(_, rest)| rest);
    rest.rsplit_once('@').map_or(rest, |(_, host)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCTL-041]
    fn addresses_are_known_ways_to_known_places() {
        use Transport::{File, Git, Http, Https, Relative, Ssh};
        for (url, transport) in [
            ("https://example.com/a.git", Https),
            ("HTTPS://example.com/a.git", Https),
            ("ssh://git@example.com:22/a", Ssh),
            ("git@example.com:a/b.git", Ssh),
            ("http://127.0.0.1:1/a", Http),
            ("git://example.com/a", Git),
            ("/srv/git/a b.git", File),
            ("/srv/a:b", File),
            ("file:///srv/git/a", File),
            ("../lib.git", Relative),
        ] {
            assert_eq!(transport_of(url), Ok(transport), "{url}");
        }
        for url in [
            "",
            "-u./payload",
            "--upload-pack=touch x",
            "ext::sh -c touch% x",
            "fd::17",
            "ssh://-oProxyCommand=touch x/a",
            "ssh://a@-oProxyCommand=x/a",
            "-oProxyCommand=x:a",
            "user@-host:a",
            "https:///a",
            "ftp://example.com/a",
            "rsync://example.com/a",
            "https://example.com/a\nurl = ext::x",
            "https://example.com/\x1b[2J",
        ] {
            assert!(transport_of(url).is_err(), "{url:?}");
        }
        let long = format!("https://example.com/{}", "a".repeat(10_000));
        assert!(transport_of(&long).is_err());
    }

    #[test] // [POOLCTL-041]
    fn only_the_checkouts_own_way_is_added() {
        assert_eq!(protocols(&[]), "https:ssh");
        assert_eq!(protocols(&[Transport::Https]), "https:ssh");
        assert_eq!(
            protocols(&[Transport::File, Transport::Git, Transport::File]),
            "https:ssh:file:git"
        );
    }

    #[test] // [POOLCTL-041]
    fn names_and_paths_stay_inside() {
        for name in ["lib", "vendor/lib", "with space", "ünï", "a..b"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
            assert_eq!(check_path(name), Ok(()), "{name}");
        }
        for name in [
            "",
            "--upload-pack=x",
            "-c",
            "../x",
            "a/../../x",
            "/x",
            "a\nb",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
            assert!(check_path(name).is_err(), "{name:?}");
        }
        for path in [".git/hooks", "a/.GIT/x", "a//b", "./a", "a/.."] {
            assert!(check_path(path).is_err(), "{path:?}");
        }
        assert!(check_name("a\\..\\b").is_err());
    }

    #[test] // [POOLCTL-041]
    fn branches_are_names() {
        for name in ["main", "feature/x", "v1.0", "ünï"] {
            assert_eq!(check_branch(name), Ok(()), "{name}");
        }
        for name in [
            "", "-f", "--force", "a..b", "a b", "a:b", "+a", "@", "a@{1}", "a/", ".a", "a.lock",
            "a*", "a\n",
        ] {
            assert!(check_branch(name).is_err() || name == "+a", "{name:?}");
        }
    }

    #[test] // [POOLCTL-041]
    fn settings_that_reach_out_are_known() {
        for (key, value) in [
            ("filter.lfs.smudge", "git-lfs smudge"),
            ("filter.a.b.process", "x"),
            ("remote.origin.uploadpack", "x"),
            ("remote.or.igin.vcs", "x"),
            ("core.gitproxy", "x"),
            ("gpg.ssh.program", "x"),
            ("gpg.program", "x"),
            ("credential.helper", "!f() { x; }; f"),
            ("credential.https://a.b.helper", "/tmp/x"),
            ("credential.helper", "store; touch x"),
            ("hook.a.command", "x"),
            ("lfs.customtransfer.a.path", "/tmp/x"),
            ("lfs.extension.a.smudge", "x"),
            ("http.savecookies", "true"),
            ("http.https://a.b/.savecookies", "Yes"),
            ("http.sslverify", "false"),
            ("http.https://a.b/.sslverify", "Off"),
            ("includeif.onbranch:a.path", "x"),
        ] {
            assert!(reaches_out(key, value), "{key}");
        }
        for (key, value) in [
            ("credential.helper", "store"),
            ("credential.helper", ""),
            ("remote.origin.url", "ext::x"),
            ("filter.lfs.required", "true"),
            ("user.name", "x"),
            ("lfs.url", "https://a.b/lfs"),
            ("http.savecookies", "false"),
            ("http.sslverify", "true"),
            ("http.proxy", "http://proxy:3128"),
            ("includeif.gitdir:/a/.path", "x"),
        ] {
            assert!(!reaches_out(key, value), "{key}");
        }
    }

    #[test] // [POOLCTL-041]
    fn detours_are_known_and_shown_without_passwords() {
        for key in [
            "http.proxy",
            "http.https://a.b/.proxy",
            "remote.origin.proxy",
            "http.sslcainfo",
        ] {
            assert!(is_detour(key), "{key}");
        }
        for key in ["http.lowspeedlimit", "remote.proxy.url", "core.proxy"] {
            assert!(!is_detour(key), "{key}");
        }
        for (address, shown) in [
            ("http://user:p@ss@proxy:3128", "proxy:3128"),
            ("proxy:3128", "proxy:3128"),
            ("/etc/ssl/own.pem", "/etc/ssl/own.pem"),
        ] {
            assert_eq!(without_user(address), shown);
        }
    }
}
