//! The arrows of imports, read from the sources: those between packages, and those between the top-level modules of a package.
//! `.specs/00_llama-orch.md` names the forbidden ones (RULE-003, RULE-004).

#![allow(clippy::unwrap_used)] // Shared helpers may fail as a test does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules that each module imports.
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Modules of `orchestratord`, each of which may import only those before it. So nothing but the API and the daemon's start sees
/// all parts (`app`).
const DAEMON_LAYERS: [&str; 17] = [
    "clock",
    "reserve",
    "background",
    "metrics",
    "state",
    "timeline",
    "retention",
    "claim",
    "live",
    "fleet",
    "queue",
    "jobs",
    "dispatch",
    "testing",
    "scheduler",
    "app",
    "api",
];
/// Modules of `pool-core`, each of which may import only those before it.
const LAYERS: [&str; 14] = [
    "kit",
    "model_ref",
    "worker",
    "worker_args",
    "api",
    "catalog",
    "config",
    "gpu",
    "nvml",
    "macos",
    "gpu_sources",
    "registry",
    "lifecycle",
    "openapi",
];
/// The error for an unknown name proposes ids of the embedded catalogue, so these two belong together.
const EXCEPTION: (&str, &str) = ("model_ref", "catalog");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// Returns the Rust files below `folder`, which may also be one file, in files and folders whose names `wanted` accepts.
fn rust_files(folder: &Path, wanted: fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return vec![folder.to_owned()];
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if !wanted(path.file_stem().unwrap().to_str().unwrap()) {
            continue;
        }
        if path.is_dir() {
            found.extend(rust_files(&path, wanted));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Returns the Rust files below `folder`, which may also be one file, without those that hold only tests.
fn sources(folder: &Path) -> Vec<PathBuf> {
    rust_files(folder, |stem| stem != "tests" && !stem.ends_with("_tests"))
}

/// Returns the code of a source file without comments and unit tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = text.lines();
    let code = lines.filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

/// Returns the modules that the code names as `crate::NAME` or `crate::{NAME, ...}`.
fn named(code: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        let is_word = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
        text.trim_start().chars().take_while(is_word).collect()
    };
    let mut found = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + path.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            continue;
        };
        // Names at the first level of the list only.
        let mut depth = 1;
        let mut item = String::new();
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => {
                    found.insert(word(&std::mem::take(&mut item)));
                    continue;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
            item.push(c);
        }
        found.insert(word(&item));
    }
    // The crate's root gives this type another path.
    if found.remove("ModelRef") {
        found.insert("model_ref".to_owned());
    }
    found
}

/// Returns the arrows between the top-level modules of the package in this folder.
fn arrows(package: &str) -> Arrows {
    let src = root().join(package).join("src");
    let mut arrows = Arrows::new();
    for entry in std::fs::read_dir(&src).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if matches!(module.as_str(), "lib" | "main") {
            continue;
        }
        let imports = arrows.entry(module.clone()).or_default();
        for source in sources(&path) {
            imports.extend(named(&code(&std::fs::read_to_string(source).unwrap())));
        }
        imports.remove(&module);
    }
    let modules: BTreeSet<_> = arrows.keys().cloned().collect();
    for imports in arrows.values_mut() {
        imports.retain(|name| modules.contains(name));
    }
    assert!(arrows.len() > 1, "no modules in {}", src.display());
    arrows
}

/// Returns the modules of a circle of imports, in order; `None` if there is no circle.
fn circle(arrows: &Arrows) -> Option<Vec<String>> {
    fn visit(
        at: &str,
        arrows: &Arrows,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> bool {
        if let Some(start) = path.iter().position(|module| module == at) {
            path.drain(..start);
            return true;
        }
        if !done.insert(at.to_owned()) {
            return false;
        }
        path.push(at.to_owned());
        if arrows[at]
            .iter()
            .any(|next| visit(next, arrows, path, done))
        {
            return true;
        }
        path.pop();
        false
    }
    let mut done = BTreeSet::new();
    arrows.keys().find_map(|start| {
        let mut path = Vec::new();
        visit(start, arrows, &mut path, &mut done).then_some(path)
    })
}

/// Returns the arrows that point from a module to a later one of `layers`, or to one that `layers` lacks.
fn upward(arrows: &Arrows, layers: &[&str]) -> Vec<(String, String)> {
    let layer = |module: &str| layers.iter().position(|layer| *layer == module);
    let pairs = arrows
        .iter()
        .flat_map(|(from, imports)| imports.iter().map(move |to| (from, to)));
    pairs
        .filter(|(from, to)| match (layer(from), layer(to)) {
            (_, None) => true,
            (from, Some(to)) => from.is_some_and(|from| to > from),
        })
        .map(|(from, to)| (from.clone(), to.clone()))
        .collect()
}

fn of(pairs: &[(&str, &[&str])]) -> Arrows {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    pairs
        .iter()
        .map(|(from, imports)| ((*from).to_owned(), owned(imports)))
        .collect()
}

// [RULE-004]
#[test]
fn the_ground_floor_uses_nothing_above_it() {
    let arrows = arrows("shared-crates/pool-core");
    let upward = upward(&arrows, &LAYERS);
    assert_eq!(upward, [(EXCEPTION.0.to_owned(), EXCEPTION.1.to_owned())]);
}

// [RULE-004]
#[test]
fn the_domain_of_the_orchestrator_does_not_see_the_whole_daemon() {
    let arrows = arrows("bin/orchestratord");
    assert_eq!(upward(&arrows, &DAEMON_LAYERS), []);
}

// [RULE-004]
#[test]
fn modules_import_each_other_in_no_circle() {
    for package in [
        "bin/llorch-candled",
        "bin/llorch-ctl",
        "bin/orchestratord",
        "bin/pool-ctl",
        "bin/pool-managerd",
        "shared-crates/orchestrator-core",
    ] {
        assert_eq!(circle(&arrows(package)), None, "{package}");
    }
}

// [RULE-003]
#[test]
fn packages_use_only_the_cores() {
    let ours = |manifest: &str| -> BTreeSet<String> {
        let manifest = std::fs::read_to_string(root().join(manifest).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        let known = [
            "pool-core",
            "orchestrator-core",
            "orchestratord",
            "llorch-ctl",
            "pool-managerd",
            "pool-ctl",
            "llorch-candled",
            "bdd-runner",
        ];
        let used = manifest["dependencies"].as_table().unwrap().keys();
        used.filter(|name| known.contains(&name.as_str()))
            .cloned()
            .collect()
    };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let (pool, both): (BTreeSet<String>, BTreeSet<String>) = (
        set(&["pool-core"]),
        set(&["orchestrator-core", "pool-core"]),
    );
    for (package, uses) in [
        ("shared-crates/pool-core", BTreeSet::new()),
        ("shared-crates/orchestrator-core", pool.clone()),
        ("bin/orchestratord", both.clone()),
        ("bin/llorch-ctl", both),
        ("bin/pool-managerd", pool.clone()),
        ("bin/pool-ctl", pool.clone()),
        ("bin/llorch-candled", pool),
    ] {
        assert_eq!(ours(package), uses, "{package}");
    }
}

/// Folders whose sources may name the SQL library: the store's, and that of the checker, which reads the database from outside.
const SQL: [&str; 2] = [
    "bin/orchestratord/src/state/sqlite",
    "test-harness/bdd-runner/src/checker",
];

// [RULE-003] Also the tests of other modules: those of the store's contract must fit another database.
#[test]
fn sql_is_behind_the_seam_of_the_store() {
    let root = root();
    let names_it = |source: &PathBuf| {
        let text = std::fs::read_to_string(source).unwrap();
        let code = |line: &&str| !line.trim_start().starts_with("//");
        text.lines().filter(code).any(|line| line.contains("sqlx"))
    };
    let (mut allowed, mut forbidden) = (BTreeSet::new(), Vec::new());
    for home in ["bin", "shared-crates", "test-harness"] {
        let packages = std::fs::read_dir(root.join(home)).unwrap();
        let folders = packages.map(|package| package.unwrap().path().join("src"));
        for folder in folders.filter(|folder| folder.is_dir()) {
            for source in rust_files(&folder, |_| true).into_iter().filter(names_it) {
                let source = source.strip_prefix(&root).unwrap().to_owned();
                match SQL.iter().find(|folder| source.starts_with(folder)) {
                    Some(folder) => drop(allowed.insert(*folder)),
                    None => forbidden.push(source),
                }
            }
        }
    }
    assert!(forbidden.is_empty(), "{forbidden:?}");
    assert_eq!(allowed.into_iter().collect::<Vec<_>>(), SQL);
}

#[test]
fn a_forbidden_arrow_is_found() {
    let source = "use crate::kit::{clock, units};\n// crate::api is a comment\nfn f() { crate::gpu::g(); $crate::h!() }\n\
        use crate::{ModelRef, worker::{self, Device}, lifecycle};\n#[cfg(test)]\nmod tests {\n    use crate::registry;\n}\n";
    let found: Vec<_> = named(&code(source)).into_iter().collect();
    assert_eq!(found, ["gpu", "kit", "lifecycle", "model_ref", "worker"]);

    let layers = ["a", "b", "c"];
    let fine = of(&[("a", &[]), ("b", &["a"]), ("c", &["a", "b"])]);
    assert_eq!((upward(&fine, &layers), circle(&fine)), (vec![], None));
    let up = of(&[("a", &["c"]), ("b", &["a"]), ("c", &["b"])]);
    assert_eq!(upward(&up, &layers), [("a".to_owned(), "c".to_owned())]);
    let round = circle(&up).unwrap();
    assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), 3, "{round:?}");
    let unknown = of(&[("a", &["z"]), ("z", &[])]);
    assert_eq!(
        upward(&unknown, &layers),
        [("a".to_owned(), "z".to_owned())]
    );
}
