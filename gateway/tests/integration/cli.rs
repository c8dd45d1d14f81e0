//! The binary as operators and service managers use it: exit status, one clear line, tables, signals.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use firmware_sim::connection::{Connection, DeviceConfig, Received};
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::process::{GatewayProcess, run, seawall};

/// A drain of a gateway without sessions, with all its ends.
const STOP_MAX: Duration = Duration::from_secs(10);

fn serve(args: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut command = seawall();
    command
        .current_dir(home.path())
        .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
        .args(args);
    run(&mut command).unwrap()
}

/// Asserts the exit status and that standard error is one line with all of `named` in it.
#[track_caller]
fn assert_refused(output: &Output, status: i32, named: &[&str]) {
    let complaint = complaint(output);
    assert_eq!(output.status.code(), Some(status), "{complaint}");
    for part in named {
        assert!(complaint.contains(part), "{part:?} is not in {complaint:?}");
    }
}

/// The one line that says why; log lines, which are JSON, come before it.
#[track_caller]
fn complaint(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('{')).collect();
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[track_caller]
fn done(command: &mut Command) -> String {
    let output = run(command).unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn unknown_or_bad_setting_is_named_with_exit_2() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("seawall.toml");
    let config = file.to_str().unwrap();
    for (text, named) in [
        ("[limits]\nhead_byte_max = 1\n", ["limits.head_byte_max", "unknown"]),
        (
            "[limits]\nhead_bytes_max = 1\n",
            ["limits.head_bytes_max", "1024 to 65536"],
        ),
        ("[server]\nlisten = \"nowhere\"\n", ["server.listen", "line 2"]),
        ("[logging]\nlevel = \"a=b=c\"\n", ["logging.level", "expected one of"]),
        (
            "[identity]\nslot_header = \"Host\"\n",
            ["identity.slot_header", "meaning"],
        ),
        (
            "[admission]\nkeys_in_flight_max = 0\n",
            ["admission.keys_in_flight_max", "65536"],
        ),
    ] {
        fs::write(&file, text).unwrap();

        assert_refused(&serve(&["--config", config]), 2, &named);
    }
}

#[test]
fn wrong_flags_and_environment_are_named_with_exit_2() {
    assert_refused(&serve(&["--no-such-flag"]), 2, &["--no-such-flag"]);
    assert_refused(&serve(&["--max-memory", "lots"]), 2, &["--max-memory", "lots"]);
    assert_refused(&serve(&["--tls-cert", "cert.pem"]), 2, &["--tls-cert"]);
    assert_refused(
        &serve(&["--database", "mysql://u:hidden@h/d"]),
        2,
        &["--database", "postgres://"],
    );
    assert!(!complaint(&serve(&["--database", "mysql://u:hidden@h/d"])).contains("hidden"));

    assert_refused(
        &serve(&["--database", "postgres://h:port/d"]),
        2,
        &["not a PostgreSQL URL"],
    );

    let bad = run(seawall().arg("serve").env("SEAWALL_OPS_LISTEN", "nowhere")).unwrap();
    assert_refused(&bad, 2, &["--ops-listen", "nowhere"]);
}

#[test]
fn ops_address_outside_loopback_stops_the_start() {
    let mut command = seawall();
    let home = tempfile::tempdir().unwrap();
    command
        .current_dir(home.path())
        .args(["serve", "--ops-listen", "0.0.0.0:0"]);

    assert_refused(&run(&mut command).unwrap(), 2, &["ops.listen", "--insecure-ops"]);
}

#[test]
fn unreadable_configuration_is_named_with_exit_2() {
    assert_refused(
        &serve(&["--config", "/nonexistent/seawall.toml"]),
        2,
        &["/nonexistent/seawall.toml"],
    );
    assert_refused(&serve(&["--config", "/"]), 2, &["configuration file /"]);
}

#[test]
fn taken_port_is_exit_1() {
    let taken = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let home = tempfile::tempdir().unwrap();
    for flags in [
        ["--listen", &address, "--ops-listen", "127.0.0.1:0"],
        ["--ops-listen", &address, "--listen", "127.0.0.1:0"],
    ] {
        let mut command = seawall();
        command.current_dir(home.path()).arg("serve").args(flags);

        assert_refused(&run(&mut command).unwrap(), 1, &[&address, "in use"]);
        assert!(!home.path().join("seawall-data/addresses.json").exists());
    }
}

#[test]
fn unusable_data_directory_is_exit_1() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let inside = file.join("data");

    for path in [file.to_str().unwrap(), inside.to_str().unwrap(), "/proc/seawall-data"] {
        assert_refused(&serve(&["--data-dir", path]), 1, &["data directory", path]);
    }
}

#[test]
fn second_gateway_on_a_data_directory_is_exit_2() {
    let first = GatewayProcess::start(&[]).unwrap();

    let second = serve(&["--data-dir", first.data_dir().to_str().unwrap()]);

    assert_refused(&second, 2, &["another gateway", first.data_dir().to_str().unwrap()]);
}

#[test]
fn unusable_database_is_exit_1() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("not.db");
    fs::write(&file, "this is no database, however long it may be".repeat(100)).unwrap();

    let refused = serve(&["--database", &format!("sqlite:{}", file.display())]);

    assert_refused(&refused, 1, &["not.db", "not an SQLite database"]);
}

#[test]
fn first_start_makes_files_that_only_the_owner_reads() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    let token = fs::metadata(gateway.data_dir().join("admin.token")).unwrap();
    assert_eq!(token.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(gateway.data_dir()).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn sigterm_drains_and_exits_0() {
    let mut gateway = GatewayProcess::start(&[]).unwrap();

    gateway.signal(Signal::TERM).unwrap();

    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
    assert!(!gateway.data_dir().join("addresses.json").exists());
}

/// A gateway with live sessions of `count` devices; it closes one a second when it drains.
async fn gateway_with_sessions(count: usize) -> (GatewayProcess, Vec<Connection>) {
    let home = tempfile::tempdir().unwrap();
    let (config, fleet) = (home.path().join("seawall.toml"), home.path().join("fleet.csv"));
    fs::write(&config, "[drain]\nrate_per_second = 1\n").unwrap();
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let out = fleet.to_str().unwrap();
    done(&mut gateway.operator(&["devices", "seed", "--count", &count.to_string(), "--out", out]));
    let url = format!("ws://{}", gateway.addresses.devices);
    let mut sessions = Vec::new();
    for line in fs::read_to_string(&fleet).unwrap().lines().skip(1) {
        let (id, secret) = line.split_once(',').unwrap();
        let device = DeviceConfig::new(id.parse().unwrap(), secret);
        sessions.push(Connection::open(&url, &device).await.unwrap());
    }
    (gateway, sessions)
}

/// Reads to the close frame; asserts that it is 1012 with a hint.
async fn assert_sent_away(mut session: Connection) {
    let closed = async {
        loop {
            match session.next_frame().await {
                Received::Closed { code, reason } => break (code, reason),
                Received::Lost => panic!("lost without a close frame"),
                Received::Text(_) | Received::Binary(_) | Received::Ping(_) | Received::Pong(_) => {}
            }
        }
    };
    let (code, reason) = tokio::time::timeout(STOP_MAX, closed).await.unwrap();
    let reason: Value = serde_json::from_str(&reason).unwrap();
    assert_eq!((code, &reason["reason"]), (1012, &Value::from("draining")));
    assert!(reason["retry_after_ms"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn sessions_are_sent_away_with_hints_at_sigterm() {
    let (mut gateway, sessions) = gateway_with_sessions(2).await;

    gateway.signal(Signal::TERM).unwrap();

    for session in sessions {
        assert_sent_away(session).await;
    }
    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
}

#[tokio::test]
async fn second_signal_sends_the_rest_away_within_2_seconds() {
    let (mut gateway, sessions) = gateway_with_sessions(12).await;
    gateway.signal(Signal::TERM).unwrap();
    while !gateway.log().unwrap().contains("drain started") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    gateway.signal(Signal::INT).unwrap();
    let asked = Instant::now();
    for session in sessions {
        assert_sent_away(session).await;
    }

    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(
        gateway.wait(STOP_MAX).unwrap().code(),
        Some(0),
        "{}",
        gateway.log().unwrap()
    );
}

#[test]
fn data_directory_is_free_again_after_a_kill() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let mut first = GatewayProcess::start_on(&data_dir, &[]).unwrap();
    first.signal(Signal::KILL).unwrap();
    first.wait(STOP_MAX).unwrap();

    let second = GatewayProcess::start_on(&data_dir, &[]).unwrap();

    assert!(run(&mut second.operator(&["nodes"])).unwrap().status.success());
}

#[test]
fn log_level_is_read_again_at_sighup() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("seawall.toml");
    fs::write(&file, "[logging]\nlevel = \"info\"\n").unwrap();
    let gateway = GatewayProcess::start(&["--config", file.to_str().unwrap()]).unwrap();

    fs::write(&file, "[logging]\nlevel = \"debug\"\n").unwrap();
    gateway.signal(Signal::HUP).unwrap();

    let deadline = Instant::now() + STOP_MAX;
    while !gateway.log().unwrap().contains("log level changed") {
        assert!(Instant::now() < deadline, "{}", gateway.log().unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    fs::write(&file, "[logging]\nlevle = 1\n").unwrap();
    gateway.signal(Signal::HUP).unwrap();
    while !gateway.log().unwrap().contains("levle") {
        assert!(Instant::now() < deadline, "{}", gateway.log().unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(run(&mut gateway.operator(&["nodes"])).unwrap().status.success());
}

#[test]
fn seed_import_and_list_fit_together() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    let path = file.to_str().unwrap();
    let mut seed = gateway.operator(&[
        "devices",
        "seed",
        "--count",
        "300",
        "--out",
        path,
        "--model",
        "box",
        "--offline",
    ]);

    done(&mut seed);
    let again = run(&mut seed).unwrap();
    let imported = json(&run(&mut gateway.operator(&["devices", "import", path, "--json"])).unwrap());
    let skipped = json(&run(&mut gateway.operator(&["devices", "import", path, "--json"])).unwrap());
    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--limit", "1000", "--json"])).unwrap());
    let page = json(&run(&mut gateway.operator(&["devices", "list", "--limit", "7", "--json"])).unwrap());

    assert_refused(&again, 1, &[path]);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        (imported["added"].as_u64(), skipped["skipped"].as_u64()),
        (Some(300), Some(300))
    );
    assert_eq!(listed["items"].as_array().unwrap().len(), 300);
    assert_eq!(listed["items"][0]["model"], "box");
    assert_eq!(
        (page["items"].as_array().unwrap().len(), page["next_cursor"].is_null()),
        (7, false)
    );
}

#[test]
fn seed_registers_where_a_gateway_answers() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fleet.csv");

    done(&mut gateway.operator(&["devices", "seed", "--count", "5", "--out", path.to_str().unwrap()]));

    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--json"])).unwrap());
    assert_eq!(listed["items"].as_array().unwrap().len(), 5);
}

#[test]
fn import_with_bad_lines_names_them_and_takes_nothing() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    let good = "6f1f64a0-0000-4000-8000-000000000001,0123456789abcdef0123456789abcdef";
    fs::write(
        &file,
        format!("id,secret\n{good}\nnot-a-uuid,0123456789abcdef\n{good}\n"),
    )
    .unwrap();

    let output = run(&mut gateway.operator(&["devices", "import", file.to_str().unwrap()])).unwrap();

    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("line 3"), "{complaint}");
    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--json"])).unwrap());
    assert_eq!(listed["items"].as_array().unwrap().len(), 0);
    let missing = run(&mut gateway.operator(&["devices", "import", "/nonexistent.csv"])).unwrap();
    assert_refused(&missing, 1, &["/nonexistent.csv"]);
}

#[test]
fn refusal_of_a_long_import_is_seen() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    fs::write(
        &file,
        format!("id,secret\n{}", format!("{}\n", "x".repeat(99)).repeat(300_000)),
    )
    .unwrap();
    let mut import = gateway.operator(&["devices", "import", file.to_str().unwrap()]);

    let without_leave = run(import.env("SEAWALL_TOKEN", "nobody")).unwrap();
    let all_bad = run(import.env_remove("SEAWALL_TOKEN")).unwrap();

    assert_refused(&without_leave, 1, &["doesn't accept this token"]);
    assert_eq!(all_bad.status.code(), Some(1));
    assert!(String::from_utf8(all_bad.stderr).unwrap().starts_with("line 2: "));
}

#[test]
fn device_is_added_changed_and_deleted() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let added = json(&run(&mut gateway.operator(&["devices", "add", "--tenant", "acme", "--json"])).unwrap());
    let id = added["id"].as_str().unwrap();

    let secret = done(&mut gateway.operator(&["devices", "rotate", id, "--overlap", "1h"]));
    done(&mut gateway.operator(&["devices", "disable", id]));
    let disabled = done(&mut gateway.operator(&["devices", "show", id]));
    done(&mut gateway.operator(&["devices", "enable", id]));
    let away = run(&mut gateway.operator(&["devices", "send", id, "{\"a\":1}"])).unwrap();
    done(&mut gateway.operator(&["devices", "delete", id]));
    let gone = run(&mut gateway.operator(&["devices", "show", id])).unwrap();

    assert!(secret.contains("secret") && !secret.contains(added["secret"].as_str().unwrap()));
    assert!(disabled.contains("disabled") && disabled.contains("acme"), "{disabled}");
    assert_refused(&away, 1, &["device_offline"]);
    assert_refused(&gone, 1, &["404"]);
    let audit = done(&mut gateway.operator(&["audit"]));
    assert!(
        audit.contains(id) && !audit.contains(added["secret"].as_str().unwrap()),
        "{audit}"
    );
}

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
fn control_characters_never_reach_the_terminal() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let name = "night\u{9b}shift\u{202e}";

    let created = run(&mut gateway.operator(&["tokens", "create", name, "--role", "viewer"])).unwrap();
    let listed = run(&mut gateway.operator(&["tokens", "list"])).unwrap();
    let refused = run(&mut gateway.operator(&["rules", "block", "=1", "--reason", "a\u{1b}[31mb"])).unwrap();

    assert_eq!(refused.status.code(), Some(1));
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
    done(&mut gateway.operator(&["tokens", "revoke", created["id"].as_str().unwrap()]));
    assert_refused(&as_watcher(&["rules", "list"]), 1, &["token"]);
}

#[test]
fn drain_starts_shows_and_is_cancelled() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    done(&mut gateway.operator(&["drain", "start", "--rate", "10", "--deadline", "1m"]));
    let status = done(&mut gateway.operator(&["drain", "status"]));
    done(&mut gateway.operator(&["drain", "cancel"]));
    let after = done(&mut gateway.operator(&["drain", "status"]));

    assert!(status.contains("drain"), "{status}");
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

    assert_refused(&output, 1, &["no gateway answers", &nobody.to_string()]);
}

#[test]
fn migrate_makes_the_tables_without_a_gateway() {
    let home = tempfile::tempdir().unwrap();

    done(seawall().arg("migrate").current_dir(home.path()));

    assert!(home.path().join("seawall-data/seawall.db").is_file());
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
