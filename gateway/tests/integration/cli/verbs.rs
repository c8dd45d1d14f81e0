//! The other commands of operators, and those that need no gateway.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpListener},
    process::Stdio,
};

use super::{assert_refused, done, json};
use crate::harness::process::{GatewayProcess, run, seawall};

#[test]
fn rule_is_blocked_listed_and_unblocked_by_range_and_by_prefix() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let block = [
        "rules",
        "block",
        ">=3.8.0-b3",
        "--reason",
        "storms",
        "--retry-after",
        "20m",
        "--expires",
        "2h",
        "--evict",
    ];

    done(&mut gateway.operator(&block));
    let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
    done(&mut gateway.operator(&["rules", "unblock", ">= 3.8.0-b3"]));
    done(&mut gateway.operator(&block));
    let again = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
    let id = again["items"][0]["id"].as_str().unwrap();
    done(&mut gateway.operator(&[
        "rules",
        "edit",
        &id[..13],
        "--reason",
        "still storms",
        "--expires",
        "never",
    ]));
    let edited = done(&mut gateway.operator(&["rules", "list"]));
    done(&mut gateway.operator(&["rules", "unblock", &id[..13]]));

    assert_eq!(listed["items"][0]["match"]["firmware"], ">=3.8.0-b3");
    assert_eq!(listed["items"][0]["evict"], true);
    assert!(edited.contains("still storms"), "{edited}");
    assert_eq!(done(&mut gateway.operator(&["rules", "list"])), "none\n");
    assert_refused(
        &run(&mut gateway.operator(&["rules", "unblock", "=1"])).unwrap(),
        1,
        &["no rule"],
    );
}

#[test]
fn edit_changes_what_a_rule_matches_and_keeps_the_rest() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let block = ["rules", "block", ">=3.8", "--model", "box", "--reason", "storms"];
    done(&mut gateway.operator(&block));
    let matches = |edit: &[&str]| {
        let rule = first_rule(&gateway);
        done(&mut gateway.operator(&[&["rules", "edit", rule.as_str()], edit].concat()));
        let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
        listed["items"][0]["match"].clone()
    };

    let moved = matches(&["--model", "tube", "--tenant", "acme"]);
    let widened = matches(&["--model", ""]);
    let narrowed = matches(&["--firmware", "=3.9"]);

    assert_eq!(
        moved,
        serde_json::json!({"firmware": ">=3.8", "model": "tube", "tenant": "acme"})
    );
    assert_eq!(widened, serde_json::json!({"firmware": ">=3.8", "tenant": "acme"}));
    assert_eq!(narrowed, serde_json::json!({"firmware": "=3.9", "tenant": "acme"}));
    let nothing =
        run(&mut gateway.operator(&["rules", "edit", &first_rule(&gateway), "--tenant", "", "--firmware", ""]));
    assert_ne!(
        nothing.unwrap().status.code(),
        Some(0),
        "a rule that matches everything"
    );
}

#[test]
fn staged_changes_are_begun_shown_and_ended() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    done(&mut gateway.operator(&["rules", "block", "2.*"]));
    done(&mut gateway.operator(&["rules", "block", "3.*", "--stages", "20,100", "--bake", "5m"]));

    let begun =
        done(&mut gateway.operator(&["rules", "release", "2.*", "--stages", "1,5,100", "--connects-min", "50"]));
    assert!(
        begun.contains("1 of 3, 1 %") && begun.contains("50 connects"),
        "{begun}"
    );
    done(&mut gateway.operator(&["rules", "rollout", "2.*", "pause"]));
    let shown = json(&run(&mut gateway.operator(&["rules", "rollout", "2.*", "--json"])).unwrap());
    let staged = json(&run(&mut gateway.operator(&["rules", "rollout", "3.*", "--json"])).unwrap());
    let reverted = done(&mut gateway.operator(&["rules", "rollout", "2.*", "revert"]));

    assert_eq!(
        (&shown["state"], &shown["direction"]),
        (&"paused".into(), &"release".into())
    );
    assert_eq!((&staged["percent"], &staged["bake"]), (&20.into(), &"5m".into()));
    assert!(reverted.contains("reverted"), "{reverted}");
    assert_refused(
        &run(&mut gateway.operator(&["rules", "rollout", "2.*", "resume"])).unwrap(),
        1,
        &["reverted"],
    );
}

#[test]
fn range_is_all_that_a_block_needs() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    done(&mut gateway.operator(&["rules", "block", ">=3.8.0-b3"]));

    let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
    assert_eq!(listed["items"][0]["match"]["firmware"], ">=3.8.0-b3");
    assert_eq!(listed["items"][0]["reason"], "");
}

#[test]
fn block_without_a_range_needs_to_say_that_it_means_every_version() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    // The arguments that a shell passes for `--model m1 >=3.8.0-b3`.
    let refused = run(&mut gateway.operator(&["rules", "block", "--model", "m1"])).unwrap();
    assert_refused(&refused, 2, &["--all-versions", "quotes"]);
    done(&mut gateway.operator(&["rules", "block", "--model", "m1", "--all-versions"]));
    done(&mut gateway.operator(&["rules", "block", "--from", "3.8.0-b3", "--below", "3.9"]));

    let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
    let matches: Vec<_> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rule| &rule["match"])
        .collect();
    assert_eq!(
        matches,
        [
            &serde_json::json!({"model": "m1"}),
            &serde_json::json!({"firmware": ">=3.8.0-b3,<3.9"})
        ]
    );
}

#[test]
fn block_says_whom_it_hits_and_what_they_are_told_and_unblock_when_they_are_back() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    let blocked = run(&mut gateway.operator(&["rules", "block", "=9", "--evict"])).unwrap();
    let (out, err) = (
        String::from_utf8(blocked.stdout).unwrap(),
        String::from_utf8(blocked.stderr).unwrap(),
    );
    let id = first_rule(&gateway);
    // Ids of rules that are created together have the same beginning.
    let removed = done(&mut gateway.operator(&["rules", "unblock", &id[id.len() - 6..]]));

    for said in [
        "blocked 0 of 0 connected devices",
        "stay away for 2m to 4m",
        "undo with: seawall rules unblock",
    ] {
        assert!(out.contains(said), "{out}");
        // Standard output is not a terminal here.
        assert!(err.contains(said), "{err}");
    }
    assert!(removed.contains("back within 4m"), "{removed}");
    assert!(
        removed.contains("evicted and have not tried again within 1m"),
        "{removed}"
    );
}

#[test]
fn rule_that_throttles_is_added_and_edited_with_its_rate_and_its_allowed_devices() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let device = "00000000-0000-0000-0000-0000000000aa";
    let add = [
        "rules", "add", "=9", "--effect", "throttle", "--rate", "5", "--allow", device,
    ];
    let added = done(&mut gateway.operator(&add));
    assert!(added.contains("throttled 0 of 0 connected devices"), "{added}");
    let id = first_rule(&gateway);
    let shown = || done(&mut gateway.operator(&["rules", "show", &id]));
    assert!(
        shown().contains("5 per second on each node") && shown().contains(device),
        "{}",
        shown()
    );

    let evicting = run(&mut gateway.operator(&["rules", "edit", &id, "--evict"])).unwrap();
    assert_refused(&evicting, 2, &["evict", "throttle"]);
    let named = run(&mut gateway.operator(&["rules", "edit", &id, "--allow", "camera 7"])).unwrap();
    assert_refused(&named, 2, &["camera 7", "not a UUID"]);
    done(&mut gateway.operator(&["rules", "edit", &id, "--rate", "7", "--allow", ""]));
    assert!(
        shown().contains("7 per second") && !shown().contains(device),
        "{}",
        shown()
    );
    done(&mut gateway.operator(&["rules", "edit", &id, "--effect", "block", "--evict"]));
    let help = done(&mut seawall_with(&["rules", "add", "--help"]));
    for word in [
        "throttle",
        "restrict",
        "--update-json",
        "--rate",
        "--allow",
        "--admit-percent",
    ] {
        assert!(help.contains(word), "{help}");
    }
}

#[test]
fn rule_that_restricts_is_added_with_its_update_and_edited_to_a_block() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let add = ["rules", "add", "=9", "--effect", "restrict"];
    let missing = run(&mut gateway.operator(&add)).unwrap();
    assert_refused(&missing, 2, &["update", "needs an update"]);
    let broken = run(&mut gateway.operator(&[&add[..], &["--update-json", "[1]"]].concat())).unwrap();
    assert_refused(&broken, 2, &["--update-json"]);

    let added =
        done(&mut gateway.operator(&[&add[..], &["--update-json", r#"{"url":"https://example.com/1"}"#]].concat()));
    assert!(added.contains("restricted 0 of 0 connected devices"), "{added}");
    let id = first_rule(&gateway);
    let shown = done(&mut gateway.operator(&["rules", "show", &id]));
    assert!(shown.contains(r#"{"url":"https://example.com/1"}"#), "{shown}");
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("update.json");
    fs::write(&file, r#"{"url": "https://example.com/2"}"#).unwrap();
    done(&mut gateway.operator(&["rules", "edit", &id, "--update-file", file.to_str().unwrap()]));
    let rule = || json(&run(&mut gateway.operator(&["rules", "show", &id, "--json"])).unwrap());
    assert_eq!(rule()["update"], serde_json::json!({"url": "https://example.com/2"}));

    done(&mut gateway.operator(&["rules", "edit", &id, "--effect", "block"]));
    assert_eq!(
        (&rule()["effect"], rule().get("update")),
        (&serde_json::json!("block"), None)
    );
}

#[test]
fn rule_is_tried_in_a_dry_run_and_enforced_on_a_share() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let tried = done(&mut gateway.operator(&["rules", "block", "=9", "--dry-run", "--admit-percent", "25"]));
    assert!(tried.contains("would block 0 of 0 connected devices"), "{tried}");
    assert!(tried.contains("--dry-run false"), "{tried}");
    let rule = || {
        let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
        let rule = &listed["items"][0];
        (
            rule["state"].as_str().unwrap().to_owned(),
            rule["mode"].as_str().unwrap().to_owned(),
            rule["admit_percent"].as_u64().unwrap(),
        )
    };
    assert_eq!(rule(), ("dry_run".into(), "dry_run".into(), 25));

    let id = first_rule(&gateway);
    done(&mut gateway.operator(&["rules", "edit", &id, "--dry-run", "false", "--admit-percent", "60"]));

    assert_eq!(rule(), ("enforced".into(), "enforce".into(), 60));
    let listed = done(&mut gateway.operator(&["rules", "list"]));
    assert!(listed.contains("ADMIT %") && listed.contains("DRY RUN"), "{listed}");
    let refused = run(&mut gateway.operator(&["rules", "block", "=8", "--admit-percent", "101"])).unwrap();
    assert_refused(&refused, 2, &["101", "0..=100"]);
}

fn seawall_with(arguments: &[&str]) -> std::process::Command {
    let mut command = seawall();
    command.args(arguments);
    command
}

#[test]
fn rule_that_is_over_already_is_refused_in_words() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let over = |arguments: &[&str]| {
        let output = run(&mut gateway.operator(&[arguments, &["--expires", "2020-01-01T00:00:00Z"]].concat()));
        assert_refused(&output.unwrap(), 2, &["expires_at: this time is over"]);
    };

    over(&["rules", "block", ">=3.8", "--reason", "storms"]);
    over(&["rules", "preview", ">=3.8"]);
    let soon = ["rules", "block", ">=3.8", "--reason", "storms", "--expires", "1m"];
    done(&mut gateway.operator(&soon));
    over(&["rules", "edit", &first_rule(&gateway)]);
}

fn first_rule(gateway: &GatewayProcess) -> String {
    let listed = json(&run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap());
    listed["items"][0]["id"].as_str().unwrap().to_owned()
}

#[test]
fn control_characters_never_reach_the_terminal() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let name = "night\u{9b}shift\u{202e}";

    let created = run(&mut gateway.operator(&["tokens", "create", name, "--role", "viewer"])).unwrap();
    let listed = run(&mut gateway.operator(&["tokens", "list"])).unwrap();
    let refused = run(&mut gateway.operator(&["rules", "block", "=1", "--reason", "a\u{1b}[31mb"])).unwrap();

    assert_eq!(refused.status.code(), Some(2));
    for output in [created, listed, refused] {
        for bytes in [output.stdout, output.stderr] {
            let text = String::from_utf8(bytes).unwrap();
            let harmful = text
                .chars()
                .find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
            assert_eq!(harmful, None, "{text:?}");
        }
    }
}

#[test]
fn token_works_with_its_role_until_it_is_revoked() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let created =
        json(&run(&mut gateway.operator(&["tokens", "create", "watcher", "--role", "viewer", "--json"])).unwrap());
    let token = created["token"].as_str().unwrap();
    let as_watcher = |args: &[&str]| run(gateway.operator(args).env("SEAWALL_TOKEN", token)).unwrap();

    assert!(as_watcher(&["rules", "list"]).status.success());
    assert_refused(&as_watcher(&["rules", "block", "=1", "--reason", "x"]), 1, &["403"]);
    let revoke = ["tokens", "revoke", created["id"].as_str().unwrap(), "--json"];
    let revoked = json(&run(&mut gateway.operator(&revoke)).unwrap());
    assert_eq!(revoked, serde_json::json!({"revoked": created["id"]}));
    assert_refused(&as_watcher(&["rules", "list"]), 1, &["token"]);
}

#[test]
fn token_is_revoked_by_its_name_and_the_audit_log_names_its_id() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let create = ["tokens", "create", "night-shift", "--role", "operator", "--json"];
    let created = json(&run(&mut gateway.operator(&create)).unwrap());
    let token = created["token"].as_str().unwrap();
    done(gateway.operator(&["rules", "block", "=9"]).env("SEAWALL_TOKEN", token));

    let twin = run(&mut gateway.operator(&create[..5])).unwrap();
    let audit = json(&run(&mut gateway.operator(&["audit", "--json"])).unwrap());
    done(&mut gateway.operator(&["tokens", "revoke", "night-shift"]));

    assert_refused(&twin, 1, &["has this name", "409"]);
    let line = audit["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|line| line["action"] == "rule.create");
    assert_eq!(line.unwrap()["actor_id"], created["id"]);
    let refused = run(gateway.operator(&["rules", "list"]).env("SEAWALL_TOKEN", token)).unwrap();
    assert_refused(&refused, 1, &["does not accept this token"]);
    // The name is available again.
    done(&mut gateway.operator(&create));
}

#[test]
fn alarms_rules_and_configuration_are_shown() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    done(&mut gateway.operator(&["rules", "block", "=9", "--reason", "boot loop"]));

    let rule = done(&mut gateway.operator(&["rules", "show", "=9"]));
    let alarms = done(&mut gateway.operator(&["alarms"]));
    let same = done(&mut gateway.operator(&["alarms", "list"]));
    let defaults = done(seawall().args(["config", "default"]));
    let shown = done(seawall().args([
        "config",
        "show",
        "--database",
        "postgres://u:hunter2@db.example/seawall",
    ]));

    assert!(rule.contains("boot loop") && rule.contains("connected now"), "{rule}");
    assert_eq!((alarms.as_str(), same.as_str()), ("none\n", "none\n"));
    assert!(
        defaults.contains("[server]\n") && defaults.contains("listen = \"127.0.0.1:8080\""),
        "{defaults}"
    );
    assert!(shown.contains("db.example") && !shown.contains("hunter2"), "{shown}");
    let wrong = run(seawall().args(["config", "show", "--max-memory", "1"])).unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn drain_starts_shows_and_is_cancelled() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    done(&mut gateway.operator(&["drain", "start", "--rate", "10", "--deadline", "1m"]));
    let status = done(&mut gateway.operator(&["drain", "status"]));
    done(&mut gateway.operator(&["drain", "cancel"]));
    let after = done(&mut gateway.operator(&["drain", "status"]));

    assert!(status.contains(" left") && status.contains("deadline   2"), "{status}");
    assert!(after.contains("idle"), "{after}");
}

#[test]
fn doctor_finds_a_healthy_gateway_healthy() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    let report = json(&run(&mut gateway.operator(&["doctor", "--json"])).unwrap());

    assert_eq!(report["healthy"], true, "{report}");
    assert!(report.to_string().contains("token: accepted"), "{report}");
}

#[test]
fn doctor_says_what_is_wrong() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();

    let output = run(seawall().args(["doctor", "--data-dir"]).arg(&file)).unwrap();

    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("is a file: move it away")
    );
}

#[test]
fn verbs_without_a_gateway_say_so() {
    let nobody = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .unwrap()
        .local_addr()
        .unwrap();

    let output = run(seawall().args(["nodes", "--url", &format!("http://{nobody}")])).unwrap();

    assert_refused(&output, 1, &["cannot reach the gateway", &nobody.to_string()]);
}

#[test]
fn versions_are_sorted_and_matched_from_standard_input() {
    let mut sort = seawall()
        .args(["versions", "sort"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sort.stdin
        .take()
        .unwrap()
        .write_all(b"3.8.0\n3.8.0-b10\nv3.8\n3.8.0-b3\nnightly")
        .unwrap();
    let sorted = sort.wait_with_output().unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("list");
    fs::write(&file, &sorted.stdout).unwrap();

    let matched = done(seawall().args(["versions", "match", ">=3.8.0-b10"]).arg(&file));

    assert_eq!(
        String::from_utf8(sorted.stdout).unwrap(),
        "nightly\n3.8.0-b3\n3.8.0-b10\n3.8.0\nv3.8\n"
    );
    assert_eq!(matched, "3.8.0-b10\n3.8.0\nv3.8\n");
    let wrong = run(seawall().args(["versions", "match", ">=1.*.2"])).unwrap();
    assert_refused(&wrong, 2, &["RANGE", "character 5"]);
}

#[test]
fn closed_standard_output_is_no_panic() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("list");
    fs::write(&file, "1.0\n".repeat(200_000)).unwrap();
    let mut child = seawall()
        .args(["versions", "sort"])
        .arg(&file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();

    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();

    assert_eq!(
        (output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()),
        (Some(0), "")
    );
}

#[test]
fn events_end_after_their_count_and_continue_after_an_id() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let mut first = gateway.operator(&["events", "--count", "2", "--type", "rules", "--json", "--after", "0"]);
    for range in ["=1", "=2", "=3"] {
        done(&mut gateway.operator(&["rules", "block", range]));
    }

    let parsed = |shown: &str| -> Vec<serde_json::Value> {
        let events = shown.lines().map(|line| serde_json::from_str(line).unwrap());
        events
            .filter(|event: &serde_json::Value| event["event"] != "missed")
            .collect()
    };
    let events = parsed(&done(&mut first));
    let id = |event: &serde_json::Value| event["id"].as_str().unwrap().parse::<u64>().unwrap();
    assert_eq!(events.len(), 2);
    assert!(events.iter().all(|event| event["event"] == "rules"));
    let last = events[1]["id"].as_str().unwrap();
    let next = ["events", "--count", "1", "--type", "rules", "--json", "--after", last];
    let next = parsed(&done(&mut gateway.operator(&next)));
    assert_eq!(next.len(), 1);
    assert!(id(&events[0]) < id(&events[1]) && id(&events[1]) < id(&next[0]));
    assert_eq!(done(&mut gateway.operator(&["events", "--count", "0"])), "");
}
