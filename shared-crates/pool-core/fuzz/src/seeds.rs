//! Program that writes the seed corpus, the valid file and its hostile variants, to the folder given as its argument.

#[path = "../../tests/support/gguf_mutants.rs"]
mod gguf_mutants;

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.expect("usage: seeds FOLDER");
    std::fs::create_dir_all(&folder)?;
    let valid = gguf_mutants::valid();
    let hostile = gguf_mutants::hostile(&valid)
        .into_iter()
        .map(|mutant| mutant.bytes);
    let mut files = 0;
    for (number, bytes) in std::iter::once(valid).chain(hostile).enumerate() {
        std::fs::write(folder.join(format!("seed-{number:04}.gguf")), bytes)?;
        files += 1;
    }
    println!("{files} seeds in {}", folder.display());
    Ok(())
}
