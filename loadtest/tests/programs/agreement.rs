//! Simulator and reality agree: one scenario in virtual time and on real sockets, compared.

use std::{fs, path::Path, process::Command};

use loadtest::server::without_settings;

use crate::{LOADTEST, seawall, told};

/// A reconnect storm whose ceiling, not the machine, is what bounds it: 8 s for all, of which devices' own first waits are 5.
const SCENARIO: &str = r#"
    name = "agreement"
    about = "A small reconnect storm, in virtual time and on real sockets."
    devices = 1600
    capacity_per_second = 200
    thresholds = ["missing == 0", "lost_sessions == 0", "t99_over_optimum <= 1.25"]
    [gateway.config.admission]
    lookups_per_second_max = 200
    [simulate]
    round_trip_ms = 0.3
    round_trip_extra_ms = 0.2
    wake_noise_ms = 2
    [[fleet]]
    name = "displays"
    firmware = { "1.0.0" = 1.0 }
    [[phase]]
    name = "connect"
    seconds = 60
    until = "connected"
    action = { connect = { per_second = 160 } }
    [[phase]]
    name = "storm"
    seconds = 60
    until = "connected"
    action = "drop-all"
"#;

#[test]
fn simulator_and_reality_agree_on_return_times_and_attempts() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = folder.path().join("agreement.toml");
    fs::write(&scenario, SCENARIO).unwrap();
    let (simulated, real) = (folder.path().join("simulated.json"), folder.path().join("real.json"));
    assert!(seawall().exists());

    report("simulate", &scenario, &simulated);
    report("run", &scenario, &real);
    let compared = loadtest().arg("compare").arg(&simulated).arg(&real).output().unwrap();

    assert!(compared.status.success(), "{}", told(&compared));
}

fn report(verb: &str, scenario: &Path, json: &Path) {
    let done = loadtest()
        .arg(verb)
        .arg(scenario)
        .arg("--json")
        .arg(json)
        .output()
        .unwrap();
    assert!(done.status.success(), "{verb}: {}", told(&done));
}

fn loadtest() -> Command {
    let mut command = Command::new(LOADTEST);
    // Run by cargo, it would build the gateway anew.
    without_settings(&mut command).env_remove("CARGO");
    command
}
