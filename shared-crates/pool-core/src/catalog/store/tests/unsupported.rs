//! Tests with files and entries that no worker can run.

use super::*;

#[test] // [STORE-015]
fn a_file_that_no_worker_runs_is_neither_imported_nor_placed() {
    let setup = Setup::new(false);
    let folder = setup.root.path();
    let mamba = GgufDraft::servable().of_architecture("mamba").bytes();
    let error = setup.place(&mamba).unwrap_err();
    assert!(matches!(error, CheckError::Unsupported(_)), "{error}");
    assert_eq!(setup.files_below_models(), [".locks/m"]);

    let part = GgufDraft::servable()
        .with_number("split.count", 3)
        .with_number("split.no", 1);
    // Later parts have no architecture, and may be recognisable only by their file name.
    let nameless = GgufDraft::servable().without("general.architecture");
    for (name, bytes, reason) in [
        ("mamba.gguf", mamba, "architecture `mamba`"),
        (
            "part.gguf",
            part.bytes(),
            "part 2 of a model that is split into 3",
        ),
        (
            "m-00002-of-00004.gguf",
            nameless.bytes(),
            "part 2 of a model that is split into 4",
        ),
        ("m.gguf", nameless.bytes(), "no `general.architecture`"),
    ] {
        fs::write(folder.join(name), bytes).unwrap();
        let error = import(&setup, &folder.join(name), None).unwrap_err();
        let ImportError::Check { source, .. } = &error else {
            panic!("{error}");
        };
        let CheckError::Unsupported(why) = source else {
            panic!("{source}");
        };
        assert!(why.to_string().contains(reason), "{why}");
        assert_eq!(error.hint(), Some(why.hint()));
    }
    // A complete file may have any name, even that of a part.
    let whole = folder.join("m-00001-of-00002.gguf");
    fs::write(&whole, tiny_gguf()).unwrap();
    import(&setup, &whole, Some("joined")).unwrap();
}

#[test] // [CATALOG-004]
fn an_entry_that_no_worker_runs_says_so() {
    let mut catalog = Catalog::embedded();
    let entry = |id: &str, facts: &str, file: &str| {
        format!(
            "[[models]]\nid = \"{id}\"\n{facts}\n\
             [[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nfile = \"{file}\"\n"
        )
    };
    let text = entry("parts", "", "x/m-00001-of-00002.gguf")
        + &entry("mamba", "architecture = \"mamba\"", "mamba.gguf");
    catalog.overlay(&text, Path::new("own.toml")).unwrap();
    let reason = |id: &str| {
        let entry = catalog.get(id).unwrap();
        assert_eq!(
            Slot::from(entry)
                .unsupported(&catalog)
                .map(|r| r.to_string()),
            entry.unsupported().map(|r| r.to_string())
        );
        entry.unsupported().map(|reason| reason.to_string())
    };
    for runs in [
        "smollm2-135m",
        "tinyllama",
        "qwen",
        "phi3",
        "llama3",
        "mistral",
    ] {
        assert_eq!(reason(runs), None, "{runs}");
    }
    assert!(reason("mamba").unwrap().contains("architecture `mamba`"));
    assert!(reason("parts").unwrap().contains("part 1 of a model"));
    let part = Slot::of_hub("a/b", None, "y/n-00002-of-00009.gguf");
    assert!(part.unsupported(&catalog).is_some());
}
