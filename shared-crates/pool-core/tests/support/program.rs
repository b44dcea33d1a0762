//! Programs that a test writes and then runs. Tests of other crates use this module too.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program that can be run at once.
///
/// Another process writes the file. If it were open in this process, a child forked by another thread at that moment
/// would keep it open until its `exec`, and a file open for writing can't be run (`ETXTBSY`).
pub fn write_program(path: &Path, content: impl AsRef<[u8]>) {
    let mut writer = Command::new("sh")
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = writer.stdin.take().unwrap();
    stdin.write_all(content.as_ref()).unwrap();
    drop(stdin);
    assert!(writer.wait().unwrap().success(), "{}", path.display());
}
