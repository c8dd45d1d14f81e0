//! What a run comes to, for people and for pipelines: exit status, reports, baseline.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use loadtest::server::without_settings;
use serde_json::Value;

use crate::{LOADTEST, schema, seawall, told};

const SCENARIO: &str = r#"
    name = "outcomes"
    about = "A fleet connects & returns."
    devices = 200
    capacity_per_second = 1000
    thresholds = ["missing == 0", "t100_seconds <= 100", "rss_max_bytes > 0"]
    [[fleet]]
    name = "all"
    firmware = { "1.0.0" = 1.0 }
    [[phase]]
    name = "connect"
    seconds = 20
    until = "connected"
    action = { connect = { per_second = 200 } }
    [[phase]]
    name = "storm"
    seconds = 60
    until = "connected"
    action = "drop-all"
"#;

fn loadtest() -> Command {
    let mut command = Command::new(LOADTEST);
    // Run by cargo, it would build the gateway again.
    without_settings(&mut command)
        .env_remove("CARGO")
        .env_remove("GITHUB_STEP_SUMMARY");
    command
}

fn simulate(scenario: &Path, arguments: &[&str]) -> Output {
    loadtest()
        .arg("simulate")
        .arg(scenario)
        .args(arguments)
        .output()
        .unwrap()
}

fn written(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    fs::write(&file, text).unwrap();
    file
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn same_mistake_has_the_same_status_in_each_subcommand() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = written(folder.path(), "scenario.toml", SCENARIO);
    let broken = written(folder.path(), "broken.toml", "name = 7");
    let (scenario, broken) = (scenario.to_str().unwrap(), broken.to_str().unwrap());
    let nowhere = "/nonexistent/file";
    let status = |arguments: &[&str]| {
        let done = loadtest().args(arguments).output().unwrap();
        assert!(!done.stderr.is_empty(), "{arguments:?}");
        done.status.code()
    };

    for arguments in [
        // A file that can't be read, or is not what it should be.
        vec!["run", nowhere],
        vec!["simulate", nowhere],
        vec!["compare", nowhere, nowhere],
        vec!["run", broken],
        vec!["simulate", broken],
        vec!["compare", broken, broken],
        vec!["run", scenario, "--baseline", nowhere],
        vec!["simulate", scenario, "--baseline", broken],
        vec![
            "run",
            scenario,
            "--devices-file",
            nowhere,
            "--target",
            "ws://127.0.0.1:1",
            "--ops",
            "http://127.0.0.1:1",
        ],
        vec![
            "run",
            scenario,
            "--token-file",
            nowhere,
            "--target",
            "ws://127.0.0.1:1",
            "--ops",
            "http://127.0.0.1:1",
        ],
        // A file that can't be written.
        vec!["run", scenario, "--json", nowhere],
        vec!["simulate", scenario, "--junit", nowhere],
        vec!["simulate", scenario, "--html", "/"],
        vec!["bench", "--write", nowhere],
        vec!["scale", "--write", nowhere],
        // Words that mean nothing.
        vec!["run", scenario, "--nonsense"],
        vec!["simulate", scenario, "--seconds", "nothing=1"],
        vec!["run", scenario, "--seconds", "nothing=1"],
        vec!["compare", scenario],
        vec!["nonsense"],
        vec![],
    ] {
        assert_eq!(status(&arguments), Some(2), "{arguments:?}");
    }
}

#[test]
fn missing_programs_and_machines_that_are_too_small_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    seawall();
    let needs_postgres = SCENARIO.replace("[[fleet]]", "[database]\n kind = \"postgres\"\n [[fleet]]");
    let scenario = written(folder.path(), "postgres.toml", &needs_postgres);
    let junit = folder.path().join("junit.xml");

    let missing = loadtest()
        .env("SEAWALL_PG_BIN", "/nonexistent")
        .arg("run")
        .arg(&scenario)
        .arg("--junit")
        .arg(&junit)
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(3), "{}", told(&missing));
    let page = fs::read_to_string(&junit).unwrap();
    assert!(
        page.contains("errors=\"1\"") && page.contains("loadtest.postgres"),
        "{page}"
    );

    let scenario = written(folder.path(), "scenario.toml", SCENARIO);
    let small = loadtest();
    let small = Command::new("sh")
        .args(["-c", "ulimit -n 300 && exec \"$0\" \"$@\""])
        .arg(small.get_program())
        .arg("run")
        .arg(&scenario)
        .env_remove("CARGO")
        .output()
        .unwrap();
    assert_eq!(small.status.code(), Some(4), "{}", told(&small));
    assert!(told(&small).contains("ulimit -n"), "{}", told(&small));
}

#[test]
fn run_writes_a_report_for_each_reader() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = written(folder.path(), "it's a scenario.toml", SCENARIO);
    let file = |name: &str| folder.path().join(name);
    let path = |name: &str| file(name).to_str().unwrap().to_owned();
    let outputs = [
        ["--json", &path("report.json")],
        ["--junit", &path("junit.xml")],
        ["--html", &path("report.html")],
        ["--markdown", &path("summary.md")],
    ];

    let held = simulate(&scenario, &outputs.concat());

    assert_eq!(held.status.code(), Some(0), "{}", told(&held));
    let report = json(&file("report.json"));
    assert_eq!(schema::faults(&report), Vec::<String>::new());
    assert_eq!(report["verdict"], "passed");
    let quoted = path("it's a scenario.toml").replace('\'', "'\\''");
    assert_eq!(report["command"], format!("loadtest simulate '{quoted}' --seed 1"));
    let junit = fs::read_to_string(file("junit.xml")).unwrap();
    assert!(
        junit.contains("tests=\"3\" failures=\"0\" errors=\"0\" skipped=\"1\""),
        "{junit}"
    );
    assert!(fs::read_to_string(file("report.html")).unwrap().contains("--seed 1"));
    assert!(
        fs::read_to_string(file("summary.md"))
            .unwrap()
            .starts_with("### outcomes: passed")
    );

    let strict = written(
        folder.path(),
        "strict.toml",
        &SCENARIO.replace("<= 100\"", "<= 0.001\""),
    );
    let summary = file("step.md");
    fs::write(&summary, "before\n").unwrap();
    let missed = loadtest()
        .arg("simulate")
        .arg(&strict)
        .args(outputs.concat())
        .args(["--annotate", "github"])
        .env("GITHUB_STEP_SUMMARY", &summary)
        .output()
        .unwrap();
    assert_eq!(missed.status.code(), Some(1), "{}", told(&missed));
    assert!(told(&missed).contains("::error title=loadtest outcomes::t100_seconds <= 0.001 does not hold"));
    assert!(
        fs::read_to_string(&summary)
            .unwrap()
            .starts_with("before\n### outcomes: FAILED")
    );
    let report = json(&file("report.json"));
    assert_eq!(
        (schema::faults(&report), &report["verdict"]),
        (Vec::new(), &"failed".into())
    );
    is_well_formed(&file("junit.xml"));
}

/// Another program's parser reads it.
fn is_well_formed(xml: &Path) {
    let script = "import sys, xml.dom.minidom as x; c = x.parse(sys.argv[1]).getElementsByTagName('testcase'); \
                  sys.exit(not all(n.getAttribute('name') and n.getAttribute('classname') for n in c) or not c)";
    let parsed = Command::new("python3").args(["-c", script]).arg(xml).output().unwrap();
    assert!(parsed.status.success(), "{}", told(&parsed));
}

#[test]
fn baseline_fails_what_is_worse_and_says_what_it_can_not_judge() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = written(folder.path(), "scenario.toml", SCENARIO);
    let reports: Vec<PathBuf> = (1..=3)
        .map(|seed| {
            let file = folder.path().join(format!("{seed}.json"));
            let done = simulate(
                &scenario,
                &["--seed", &seed.to_string(), "--json", file.to_str().unwrap()],
            );
            assert_eq!(done.status.code(), Some(0), "{}", told(&done));
            file
        })
        .collect();
    let against = |files: &[&Path], more: &[&str]| {
        let mut arguments: Vec<&str> = more.to_vec();
        for file in files {
            arguments.extend(["--baseline", file.to_str().unwrap()]);
        }
        simulate(&scenario, &arguments)
    };
    let all: Vec<&Path> = reports.iter().map(PathBuf::as_path).collect();
    let out = folder.path().join("out.json");
    let junit = folder.path().join("junit.xml");
    let outputs = ["--json", out.to_str().unwrap(), "--junit", junit.to_str().unwrap()];

    let same = against(&all, &outputs);
    assert_eq!(same.status.code(), Some(0), "{}", told(&same));
    assert_eq!(schema::faults(&json(&out)), Vec::<String>::new());

    let two = against(&all[..2], &[]);
    assert_eq!(two.status.code(), Some(0), "{}", told(&two));
    assert!(told(&two).contains("not judged: 2 of the 3 runs"), "{}", told(&two));

    // One file with three runs, each twice as fast as this machine ever is.
    let faster: Vec<Value> = reports
        .iter()
        .map(|file| {
            let mut report = json(file);
            report["t99_seconds"] = (report["t99_seconds"].as_f64().unwrap() / 2.0).into();
            report
        })
        .collect();
    let faster = written(folder.path(), "faster.json", &Value::from(faster).to_string());
    let worse = against(&[&faster], &outputs);
    assert_eq!(worse.status.code(), Some(1), "{}", told(&worse));
    let report = json(&out);
    assert_eq!(
        (schema::faults(&report), &report["passed"]),
        (Vec::new(), &false.into())
    );
    let page = fs::read_to_string(&junit).unwrap();
    assert!(
        page.contains("name=\"baseline: t99_seconds\" time=\"0\"><failure"),
        "{page}"
    );
    let tolerated = against(&[&faster], &["--tolerance", "2"]);
    assert_eq!(tolerated.status.code(), Some(0), "{}", told(&tolerated));

    let other = against(&all, &["--devices", "100"]);
    assert_eq!(other.status.code(), Some(2), "{}", told(&other));
    assert!(told(&other).contains("200 devices"), "{}", told(&other));
}
