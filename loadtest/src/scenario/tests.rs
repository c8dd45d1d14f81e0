use super::*;

const GOOD: &str = r#"
    name = "storm"
    about = "Everything drops."
    devices = 100
    capacity_per_second = 50
    thresholds = ["lost_sessions == 0"]
    groups = { healthy = ["3.8.0-b2"] }

    [[fleet]]
    name = "displays"
    firmware = { "3.8.0-b2" = 0.7, "3.8.0-b3" = 0.3 }

    [[phase]]
    name = "connect"
    seconds = 10
    until = "connected"
    action = { connect = { per_second = 50 } }

    [[phase]]
    name = "storm"
    seconds = 10
    action = "drop-all"

    [[phase]]
    name = "blocked"
    seconds = 10
    action = { block = { range = ">=3.8.0-b3", evict = true } }
    churn_per_second = 2
    churn_group = "healthy"
"#;

#[test]
fn thresholds_on_the_naive_server_leave_with_it() {
    let text = GOOD.replace("lost_sessions == 0", "lost_sessions == 0\", \"naive.t99_seconds > 1");
    let text = text.replace(
        "    groups =",
        "    naive = { pool = 10 }\n    database = { kind = \"postgres\" }\n    groups =",
    );
    let without_naive = Changes {
        is_without_naive: true,
        ..Changes::default()
    };

    let scenario = changed(&text, &without_naive).unwrap();

    assert_eq!(scenario.not_judged, ["naive.t99_seconds > 1"]);
    assert_eq!((scenario.run_names(), scenario.thresholds.len()), (vec!["seawall"], 1));
}

#[test]
fn short_form_changes_devices_and_phases_and_leaves_out_what_has_no_phase() {
    let text = GOOD.replace(
        "\"lost_sessions == 0\"",
        "\"lost_sessions == 0\", \"seawall.blocked.missing == 0\"",
    );
    let short = "\n[short]\ndevices = 10\nseconds = { connect = 2, blocked = 0 }\n";
    let is_short = Changes {
        is_short: true,
        seconds: vec![("storm".to_owned(), 3.5)],
        ..Changes::default()
    };

    let scenario = changed(&(text.clone() + short), &is_short).unwrap();

    assert_eq!((scenario.devices, scenario.phases.len()), (10, 2));
    assert_eq!(scenario.time_max(), Duration::from_secs_f64(5.5));
    assert_eq!(scenario.not_judged, ["seawall.blocked.missing == 0"]);
    for (text, changes, expected) in [
        (text.clone(), is_short.clone(), "no short form"),
        (
            text + "\n[short]\nseconds = { gone = 1 }\n",
            is_short,
            "no phase \"gone\"",
        ),
        (
            GOOD.to_owned(),
            Changes {
                seconds: vec![("gone".to_owned(), 1.0)],
                ..Changes::default()
            },
            "`--seconds`: there is no phase \"gone\"",
        ),
    ] {
        let error = changed(&text, &changes).unwrap_err();

        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_scenario_is_read() {
    let scenario = parse(GOOD).unwrap();

    assert_eq!(scenario.phases.len(), 3);
    assert_eq!(scenario.seed, 1);
    assert_eq!(scenario.group_names().collect::<Vec<_>>(), ["all", "healthy"]);
    assert_eq!(scenario.time_max(), Duration::from_secs(30));
    assert_eq!(scenario.run_names(), ["seawall"]);
}

#[test]
fn each_mistake_is_named() {
    for (from, to, expected) in [
        ("devices = 100", "devices = 0", "`devices`: expected 1 to 18000"),
        ("devices = 100", "device = 100", "unknown field `device`"),
        ("0.7", "0.8", "`fleet.displays.firmware`: parts must add up to 1"),
        ("\"drop-all\"", "\"drop-some\"", "unknown variant `drop-some`"),
        (
            "per_second = 50 }",
            "per_second = 50, x = 1 }",
            "unexpected keys in table: x",
        ),
        ("\"drop-all\"", "{ drop = { group = \"well\" } }", "no group `well`"),
        (
            "\"drop-all\"",
            "{ database = \"frozen\" }",
            "only a PostgreSQL can be slow, frozen or killed",
        ),
        (
            "\"storm\"\n    seconds",
            "\"connect\"\n    seconds",
            "`connect` is there twice",
        ),
        ("churn_group = \"healthy\"", "churn_group = \"well\"", "no group `well`"),
        ("[\"3.8.0-b2\"]", "[\"3.8.0\"]", "no fleet ever runs version 3.8.0"),
        (
            "[\"lost_sessions == 0\"]",
            "[\"lost_sessions = 0\"]",
            "expected <, <=, ==, !=, >= or >",
        ),
        ("[\"lost_sessions == 0\"]", "[]", "proves nothing"),
        ("seconds = 10", "seconds = -1", "expected more than 0"),
        (
            "name = \"displays\"",
            "name = \"displays\"\n profile = { rude = 1.0 }",
            "rude",
        ),
        ("about", "naive = { pool = 10 }\n about", "need \"postgres\""),
        ("\"drop-all\"", "{ gateway = \"killed\" }", "but not killed"),
        (
            "\"drop-all\"",
            "{ gateway = { slow = { factor = 1 } } }",
            "expected 1.5 to 100",
        ),
        (
            "action = \"drop-all\"",
            "power_cuts_per_second = 1",
            "power cuts and closes need [presence]",
        ),
        (
            "about",
            "presence = { away_seconds = 0 }\n about",
            "`presence.away_seconds`",
        ),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from} is in the scenario");

        let error = parse(&text).unwrap_err();

        assert!(error.contains(expected), "{to}: {error}");
    }
}

#[test]
fn devices_and_seed_can_be_overridden() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.toml");
    std::fs::write(&path, GOOD).unwrap();

    let devices = |devices: u32| Changes {
        devices: Some(devices),
        seed: Some(9),
        ..Changes::default()
    };

    let scenario = Scenario::from_file(&path, &devices(7), Executor::Run).unwrap();
    let error = Scenario::from_file(&path, &devices(20_000), Executor::Run)
        .unwrap_err()
        .to_string();

    assert_eq!((scenario.devices, scenario.seed), (7, 9));
    assert!(error.contains("`devices`"), "{error}");
}

#[test]
fn the_scenarios_that_we_deliver_can_be_run() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();

        let scenario = Scenario::from_file(&path, &Changes::default(), Executor::Run).unwrap();
        crate::report::check_names(&scenario, &scenario.thresholds().unwrap()).unwrap();
        if scenario.short.is_some() {
            let is_short = Changes {
                is_short: true,
                ..Changes::default()
            };
            Scenario::from_file(&path, &is_short, Executor::Run).unwrap();
        }

        assert_eq!(path.file_stem().unwrap().to_str(), Some(scenario.name.as_str()));
        count += 1;
    }
    assert!(count >= 3);
}

#[test]
fn a_threshold_on_a_figure_that_there_is_not_is_a_mistake() {
    let scenario = parse(&GOOD.replace("lost_sessions == 0", "naive.lost_sessions == 0")).unwrap();

    let error = crate::report::check_names(&scenario, &scenario.thresholds().unwrap()).unwrap_err();

    assert!(error.to_string().contains("no figure `naive.lost_sessions`"), "{error}");
}

fn changed(text: &str, changes: &Changes) -> Result<Scenario, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.toml");
    std::fs::write(&path, text).unwrap();
    Scenario::from_file(&path, changes, Executor::Run).map_err(|error| error.to_string())
}

fn parse(text: &str) -> Result<Scenario, String> {
    let scenario: Scenario = toml::from_str(text).map_err(|error| error.to_string())?;
    scenario.check(Executor::Run).map_err(|error| error.to_string())?;
    Ok(scenario)
}
