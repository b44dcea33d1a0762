use super::*;

fn load(file: &str, vars: &[(&str, &str)]) -> Result<PoolConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    std::fs::create_dir_all(home.config_dir()).unwrap();
    std::fs::write(home.config_file("pool-managerd.toml"), file).unwrap();
    let env = |name: &str| {
        vars.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    };
    PoolConfig::load_with(&home, None, &env).map_err(|error| error.to_string())
}

#[test] // [POOLD-001]
fn variables_go_over_the_file_over_the_defaults() {
    let file = "pool_id = \"mac\"\nheartbeat_interval_ms = 500\n[workers]\nport_min = 8100\n";
    let vars = [
        ("LLORCH_POOL_BIND", "127.0.0.1:0"),
        ("LLORCH_POOL_ID", "blep"),
        ("LLORCH_ORCHESTRATOR_URL", "http://127.0.0.1:8080"),
        ("LLORCH_MODELS_DIR", "/srv/models"),
        ("LLORCH_MEMORY_CPU_LIMIT_BYTES", "1000"),
        ("LLORCH_WORKERS_THREADS", "3"),
        ("LLORCH_GPU_NVML_LIBRARY", "/opt/driver/libnvidia-ml.so.1"),
    ];
    let config = load(file, &vars).unwrap();
    assert_eq!((config.pool_id.as_str(), config.bind.port()), ("blep", 0));
    assert_eq!(
        (
            config.heartbeat_interval_ms,
            config.workers.port_min,
            config.workers.port_max
        ),
        (500, 8100, 8999)
    );
    assert_eq!(
        config.orchestrator_url.as_deref(),
        Some("http://127.0.0.1:8080")
    );
    assert_eq!(config.models_dir(&Home::at("/h")), Path::new("/srv/models"));
    assert_eq!(
        config.allow_paths(&Home::at("/h")),
        [Path::new("/srv/models")]
    );
    assert_eq!(
        (config.memory.cpu_limit_bytes, config.workers.threads),
        (Some(1000), NonZeroU32::new(3))
    );
    assert_eq!(
        config.gpu.nvml_library.as_deref(),
        Some(Path::new("/opt/driver/libnvidia-ml.so.1"))
    );
}

#[test] // [POOLD-002]
fn only_a_pool_manager_needs_an_address_that_others_reach() {
    let advertised = |text: &str| load(text, &[]).unwrap().check_advertised();
    let everywhere = "bind = \"0.0.0.0:1\"\n";
    let error = advertised(&format!("{everywhere}orchestrator_url = \"http://a\"")).unwrap_err();
    assert!(error.to_string().starts_with("`advertise_url`"), "{error}");
    assert!(error.hint().unwrap().contains("advertise_url = "));
    for good in [
        "orchestrator_url = \"http://a\"\nadvertise_url = \"http://b\"",
        "orchestrator_url = \"none\"",
        "",
    ] {
        advertised(&format!("{everywhere}{good}")).unwrap();
    }
}

#[test] // [POOLD-001]
fn senseless_values_are_refused_by_name() {
    for (file, key) in [
        ("pool_id = \"\"", "pool_id"),
        ("[gpu]\ndeadline_ms = 0", "gpu.deadline_ms"),
        ("[gpu]\npoll_interval_ms = 1", "gpu.poll_interval_ms"),
        ("[gpu]\nnvml_library = \"lib.so\"", "gpu.nvml_library"),
        ("pool_id = \"../a\"", "pool_id"),
        ("orchestrator_url = \"blep\"", "orchestrator_url"),
        ("orchestrator_url = \"ftp://blep:8080\"", "orchestrator_url"),
        ("bind = \"blep:9200\"", "bind"),
        (
            "memory.cpu_limit_bytes = \"much\"",
            "memory.cpu_limit_bytes",
        ),
        ("heartbeat_interval_ms = 19", "heartbeat_interval_ms"),
        ("heartbeat_interval_ms = 600001", "heartbeat_interval_ms"),
        ("[models]\nallow_hop = true", "models.allow_hop"),
        ("[memory]\ngpu_limit_byte = 1", "memory.gpu_limit_byte"),
        ("[workers]\nbind = \"blep\"", "workers.bind"),
        (
            "[workers]\nport_min = 9000\nport_max = 8000",
            "workers.port_min",
        ),
        ("[workers]\nthreads = 0", "workers.threads"),
        ("[workers]\nthreads = 1025", "workers.threads"),
        (
            "[workers]\nstart_timeout_s = 86401",
            "workers.start_timeout_s",
        ),
        (
            "[workers]\nstop_timeout_s = 86401",
            "workers.stop_timeout_s",
        ),
        ("[workers]\nstall_timeout_s = 0", "workers.stall_timeout_s"),
        (
            "[workers]\nstall_timeout_s = 86401",
            "workers.stall_timeout_s",
        ),
        ("[models]\nallow_paths = [\"models\"]", "models.allow_paths"),
        ("[workers]\nport_mim = 1", "workers.port_mim"),
        ("repo_path = \"llama-orch\"", "repo_path"),
    ] {
        let error = load(file, &[]).unwrap_err();
        assert!(error.contains(&format!("`{key}`")), "{file}: {error}");
    }
}

#[test] // [POOLD-033]
fn the_orchestrator_is_the_local_one_unless_another_or_none_is_named() {
    for (address, url) in [
        ("\"blep:8080\"", "http://blep:8080"),
        ("\":8081\"", "http://127.0.0.1:8081"),
        ("8081", "http://127.0.0.1:8081"),
    ] {
        let named = load(&format!("orchestrator_url = {address}"), &[]).unwrap();
        assert_eq!(named.orchestrator(), Orchestrator::At(url));
        let named = load(
            &format!("advertise_url = {address}\nbind = {address}"),
            &[
                ("LLORCH_POOL_BIND", ":9300"),
                ("LLORCH_WORKERS_STOP_TIMEOUT_S", "2m"),
            ],
        );
        let named = named.unwrap();
        assert_eq!(named.advertise_url.as_deref(), Some(url));
        assert_eq!(named.bind.to_string(), "127.0.0.1:9300");
        assert_eq!(named.workers.stop_timeout_s, 120);
    }
    let none = load("orchestrator_url = \"\"", &[]).unwrap();
    assert_eq!(none.orchestrator(), Orchestrator::None);
    let none = load("", &[("LLORCH_ORCHESTRATOR_URL", "none")]).unwrap();
    assert_eq!(none.orchestrator(), Orchestrator::None);
    // An empty variable counts as unset.
    let local = load("", &[("LLORCH_ORCHESTRATOR_URL", "")]).unwrap();
    assert_eq!(local.orchestrator(), Orchestrator::Local);
    let named = load("orchestrator_url = \"http://blep:8080\"", &[]).unwrap();
    assert_eq!(named.orchestrator(), Orchestrator::At("http://blep:8080"));
    // Without an orchestrator, or with one on the same host, the pool needs no address that other hosts can reach.
    for url in ["", "orchestrator_url = \"none\""] {
        load(&format!("bind = \"0.0.0.0:1\"\n{url}"), &[]).unwrap();
    }
}

#[test]
fn the_default_is_valid_whatever_the_host_is_called() {
    PoolConfig::default().validate().unwrap();
}

#[test]
fn large_files_get_longer_to_load() {
    let workers = WorkersConfig::default();
    assert_eq!(workers.start_timeout(98_362_432), Duration::from_secs(120));
    assert_eq!(
        workers.start_timeout(40_000_000_000),
        Duration::from_secs(400)
    );
}

fn unknown(set: &[&str]) -> Vec<String> {
    PoolConfig::unknown_variables(set.iter().map(|name| (*name).to_owned()))
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test] // [POOLCORE-047]
fn a_mistyped_variable_is_told_with_the_nearest_known_one() {
    assert_eq!(
        unknown(&[
            "LLORCH_MEMORY_CPU_LIMIT_BYTE",
            "LLORCH_POOL_BND",
            "LLORCH_HOEM",
            "LLORCH_SOMETHING_ELSE_ENTIRELY",
            "LLORCH_\u{1b}[2J",
            "PATH",
        ]),
        [
            "unknown variable LLORCH_\\u{1b}[2J",
            "unknown variable LLORCH_HOEM: did you mean LLORCH_HOME?",
            "unknown variable LLORCH_MEMORY_CPU_LIMIT_BYTE: did you mean LLORCH_MEMORY_CPU_LIMIT_BYTES?",
            "unknown variable LLORCH_POOL_BND: did you mean LLORCH_POOL_BIND?",
            "unknown variable LLORCH_SOMETHING_ELSE_ENTIRELY",
        ]
    );
}

#[test] // [POOLCORE-047]
fn variables_of_settings_of_other_programs_and_of_tests_are_known() {
    let known = [
        "LLORCH_MEMORY_CPU_LIMIT_BYTES",
        "LLORCH_POOL_BIND",
        "LLORCH_BIND",
        "LLORCH_HOME",
        "LLORCH_API_TOKEN",
        "LLORCH_POOL_TOKEN_FILE",
        "LLORCH_QUEUE_CAPACITY",
        "LLORCH_WORKER_SECRET",
        "LLORCH_TEST_MODEL",
        "LLORCH_CRASH_AT",
    ];
    assert_eq!(unknown(&known), [""; 0]);
}

#[cfg(feature = "openapi")]
#[test] // [POOLCORE-046]
fn every_key_is_explained_and_what_is_commented_out_is_the_default() {
    let defaults = Loaded {
        value: PoolConfig::default(),
        origins: Vec::new(),
    };
    let text = settings::annotated(&defaults, &[("LLORCH_POOL_BIND", "bind")]).unwrap();
    let meanings = settings::meanings::<PoolConfig>();
    for setting in settings::list(&defaults).unwrap() {
        assert!(
            meanings.contains_key(&setting.key),
            "{} has no description",
            setting.key
        );
        let name = setting.key.rsplit('.').next().unwrap();
        assert!(text.contains(&format!("\n#{name} =")), "{name}:\n{text}");
    }
    assert!(text.contains("# Variable: LLORCH_BIND or LLORCH_POOL_BIND\n#bind = "));
    // Uncomment every key, as a user might.
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') && !rest.ends_with('=') => rest,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(
        toml::from_str::<PoolConfig>(&uncommented).unwrap(),
        PoolConfig::default(),
        "{uncommented}"
    );
    assert_eq!(
        toml::from_str::<PoolConfig>(&text).unwrap(),
        PoolConfig::default()
    );
}
