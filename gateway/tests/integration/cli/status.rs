//! Exit status and errors, as scripts read them.

use std::{fs, net::TcpListener, process::Output};

use serde_json::Value;

use super::assert_refused;
use crate::harness::process::{GatewayProcess, run, seawall};

#[test]
fn value_that_is_not_allowed_is_wrong_use_whoever_finds_it() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let refused = |args: &[&str]| run(&mut gateway.operator(args)).unwrap();

    assert_refused(
        &refused(&["rules", "block", "=1", "--retry-after", "15"]),
        2,
        &["--retry-after"],
    );
    assert_refused(
        &refused(&["rules", "block", "=1", "--retry-after", "0s"]),
        2,
        &["retry_after"],
    );
    assert_refused(&refused(&["log-level", "verbose"]), 2, &["level"]);
    assert_refused(&refused(&["events", "--after", "abc"]), 2, &["--after", "whole number"]);
    assert_refused(&refused(&["audit", "--cursor", "abc"]), 2, &["cursor"]);
    let missing = "6f1f64a0-0000-4000-8000-000000000001";
    assert_refused(&refused(&["devices", "show", missing]), 1, &["404"]);
}

#[test]
fn errors_are_json_where_json_is_asked_for() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    fs::write(&file, "id,secret\nnot-a-uuid,0123456789abcdef0123456789abcdef\n").unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();

    let import = run(&mut gateway.operator(&["devices", "import", file.to_str().unwrap(), "--json"])).unwrap();
    let usage = run(seawall().args(["ruels", "list", "--json"])).unwrap();
    let away = run(seawall().args(["nodes", "--json", "--url", &format!("http://{nobody}")])).unwrap();

    assert_eq!(import.status.code(), Some(1));
    let problem = error(&import);
    assert_eq!((&problem["status"], &problem["code"]), (&422.into(), &"invalid".into()));
    assert_eq!(
        (&problem["bad"], &problem["bad_lines"][0]["number"]),
        (&1.into(), &2.into())
    );
    assert!(
        problem["detail"].as_str().unwrap().contains("1 line is wrong"),
        "{problem}"
    );
    assert_eq!(usage.status.code(), Some(2));
    assert!(error(&usage)["detail"].as_str().unwrap().contains("'rules'"));
    assert_eq!(
        (away.status.code(), &error(&away)["code"]),
        (Some(1), &"unreachable".into())
    );
}

#[test]
fn range_that_matches_nothing_prints_nothing_and_is_done() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("list");
    fs::write(&file, "1.0\n2.0\n").unwrap();
    let matched = |range: &str| run(seawall().args(["versions", "match", range]).arg(&file)).unwrap();

    assert_eq!(matched("=2").status.code(), Some(0));
    let nothing = matched("=3");
    assert_eq!(nothing.status.code(), Some(0));
    assert!(nothing.stdout.is_empty() && nothing.stderr.is_empty(), "{nothing:?}");
}

/// Asserts that standard error is one JSON value.
#[track_caller]
fn error(output: &Output) -> Value {
    serde_json::from_slice(&output.stderr).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}
