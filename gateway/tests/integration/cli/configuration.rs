//! The configuration of a running gateway: read again from its file and from URLs, and from variables at the start.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{assert_refused, done, serve};
use crate::harness::{
    process::{GatewayProcess, run, seawall},
    wait::eventually_blocking,
};

/// Byte by byte, without end.
const DRIP: &str = "drip";
/// The connection is closed without an answer.
const RESET: &str = "reset";

/// A server that gives one answer to everybody. Its thread ends with the process.
struct Server {
    address: SocketAddr,
    answer: Arc<Mutex<String>>,
}

impl Server {
    fn start(answer: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(answer.to_owned()));
        let shared = Arc::clone(&answer);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answer = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // A gateway that leaves is not a failure of the server.
                thread::spawn(move || drop(reply(&stream, &answer)));
            }
        });
        Self { address, answer }
    }

    fn set(&self, answer: &str) {
        *self.answer.lock().unwrap() = answer.to_owned();
    }

    fn url(&self) -> String {
        format!("http://{}/seawall.toml?token=hunter2", self.address)
    }
}

fn reply(mut stream: &TcpStream, answer: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    match answer {
        RESET => Ok(()),
        DRIP => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")?;
            for _ in 0..300 {
                stream.write_all(b"#")?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        }
        answer => stream.write_all(answer.as_bytes()),
    }
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}")
}

fn level(level: &str) -> String {
    format!("[logging]\nlevel = \"{level}\"\n")
}

fn good(body: &str) -> String {
    answer("200 OK", "", body)
}

/// A configuration file that names these URLs.
fn of_urls(urls: &[String], more: &str) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("seawall.toml");
    let mut text = format!("[source]\nurls = {urls:?}\nrefresh = \"1h\"\n");
    text.write_str(more).unwrap();
    fs::write(&path, text).unwrap();
    (home, path)
}

fn start(home: &TempDir, file: &Path) -> GatewayProcess {
    GatewayProcess::start_on(&home.path().join("data"), &["--config", file.to_str().unwrap()]).unwrap()
}

fn node(gateway: &GatewayProcess) -> Value {
    let nodes = done(&mut gateway.operator(&["nodes", "--json"]));
    let nodes: Value = serde_json::from_str(&nodes).unwrap();
    nodes.pointer("/items/0").or_else(|| nodes.get(0)).cloned().unwrap()
}

fn fetched(gateway: &GatewayProcess, outcome: &str) -> u64 {
    let series = format!("seawall_config_fetches_total{{outcome=\"{outcome}\"}}");
    gateway.metric(&series).unwrap()
}

#[test]
fn whatever_a_url_answers_the_configuration_in_use_stays_until_a_valid_one_comes() {
    let server = Server::start(&answer(
        "200 OK",
        "etag: \"1\"\r\n",
        &level("warn,seawall_gateway=info"),
    ));
    let (home, file) = of_urls(&[server.url()], "");
    let gateway = start(&home, &file);
    eventually_blocking(|| fetched(&gateway, "unchanged") == 1);
    let first = node(&gateway);
    assert_eq!(first["log_level"], "warn,seawall_gateway=info");
    assert_eq!(first["config"]["source"], "peer");
    assert_eq!(first["config"]["state"], "fresh");
    // Two of [source], the listeners and the directory that the test gives, and the level.
    assert_eq!(first["config"]["items"], 6);

    let new = level("info");
    let truncated = good(&new).replace("content-length: ", "content-length: 9");
    let long = good(&format!("#{}", "x".repeat(2 << 20)));
    for (bad, outcome) in [
        (RESET.to_owned(), "unreachable"),
        (truncated, "truncated"),
        (answer("302 Found", "location: /x\r\n", ""), "redirected"),
        (answer("404 Not Found", "", &new), "client_error"),
        (answer("503 Service Unavailable", "", &new), "server_error"),
        (answer("200 OK", "etag: \"1\"\r\n", &new), "etag_reused"),
        (answer("200 OK", "content-type: text/html\r\n", &new), "wrong_type"),
        (good(" \n"), "empty"),
        (long, "too_large"),
        (good("[limits]\nhead_byte_max = 1\n"), "invalid"),
        (good("[limits]\nhead_bytes_max = 1\n"), "invalid"),
        (good("[source]\nurls = []\n"), "invalid"),
        (
            answer("200 OK", "etag: \"2\"\r\n", &level("warn,seawall_gateway=info")),
            "unchanged",
        ),
    ] {
        server.set(&bad);
        let before = fetched(&gateway, outcome);
        gateway.signal(Signal::HUP).unwrap();

        eventually_blocking(|| fetched(&gateway, outcome) > before);

        let now = node(&gateway);
        assert_eq!(now["log_level"], first["log_level"], "{outcome}");
        assert_eq!(now["config"]["revision"], 1, "{outcome}");
        assert_eq!(now["config"]["digest"], first["config"]["digest"], "{outcome}");
        if outcome == "invalid" {
            let refused = now["config"]["refused"].as_str().unwrap();
            assert!(refused.contains(&server.address.to_string()), "{refused}");
        }
    }
    server.set(&good(&new));
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| fetched(&gateway, "taken") == 1);

    let now = node(&gateway);
    assert_eq!(now["log_level"], "info");
    assert_eq!(now["config"]["revision"], 2);
    assert_eq!(now["config"]["refused"], Value::Null);
    let log = gateway.log().unwrap();
    assert!(!log.contains("hunter2"), "{log}");
    let shown = done(gateway.operator(&["config", "show", "--config"]).arg(&file));
    assert!(
        !shown.contains("hunter2") && shown.contains("level = \"info\""),
        "{shown}"
    );
}

#[test]
fn second_url_serves_where_the_first_does_not_and_the_disk_where_neither_does() {
    let (first, second) = (Server::start(RESET), Server::start(&good(&level("debug"))));
    let (home, file) = of_urls(&[first.url(), second.url()], "");
    let gateway = start(&home, &file);
    eventually_blocking(|| gateway.data_dir().join("shared-config.toml").exists());
    assert_eq!(node(&gateway)["log_level"], "debug");
    drop(gateway);

    // Neither answers: a hanging one holds a start up for 2 s.
    second.set(DRIP);
    let begun = Instant::now();
    let gateway = start(&home, &file);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let now = node(&gateway);
    assert_eq!(now["log_level"], "debug");
    assert_eq!(now["config"]["source"], "disk");
    let doctor = run(gateway.operator(&["config", "show", "--config"]).arg(&file)).unwrap();
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("level = \"debug\""));
    drop(gateway);

    // A damaged file is as none, and a node without a configuration does not start with another one.
    second.set(RESET);
    let kept = home.path().join("data").join("shared-config.toml");
    let text = fs::read_to_string(&kept).unwrap();
    fs::write(&kept, text.replace("debug", "trace")).unwrap();
    let data = home.path().join("data");
    let refused = serve(&["--config", file.to_str().unwrap(), "--data-dir", data.to_str().unwrap()]);
    assert_refused(
        &refused,
        1,
        &[
            &first.address.to_string(),
            &second.address.to_string(),
            "no configuration",
        ],
    );
    assert!(!format!("{refused:?}").contains("hunter2"));
}

#[test]
fn file_that_changes_is_read_again_and_says_what_waits_for_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("seawall.toml");
    fs::write(&file, level("info")).unwrap();
    let gateway = start(&home, &file);
    // Its state at the start is known once a check was made.
    eventually_blocking(|| gateway.metrics().unwrap().contains("seawall_config_age_seconds 0"));

    fs::write(&file, level("debug") + "[limits]\nhead_bytes_max = 9000\n").unwrap();
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| node(&gateway)["log_level"] == "debug");
    let config = node(&gateway)["config"].clone();
    assert_eq!(config["restart_needed"], serde_json::json!(["limits.head_bytes_max"]));
    assert_eq!(config["state"], "fresh");

    fs::write(&file, "[limits]\nhead_bytes_max = 1\n").unwrap();
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| node(&gateway)["config"]["refused"].is_string());
    let now = node(&gateway);
    assert_eq!(now["log_level"], "debug");
    assert!(now["config"]["refused"].as_str().unwrap().contains("head_bytes_max"));
    let alarms = done(&mut gateway.operator(&["alarms", "--json"]));
    assert!(alarms.contains("config_refused"), "{alarms}");

    // Without a signal, within two checks.
    fs::write(&file, level("warn")).unwrap();
    let begun = Instant::now();
    while node(&gateway)["log_level"] != "warn" {
        assert!(begun.elapsed() < Duration::from_secs(20), "the change was not noticed");
        thread::sleep(Duration::from_millis(100));
    }
    let config = node(&gateway)["config"].clone();
    assert_eq!(
        (&config["refused"], &config["restart_needed"]),
        (&Value::Null, &serde_json::json!([]))
    );
}

#[test]
fn every_setting_can_come_from_a_variable_and_a_wrong_one_stops_the_start() {
    let home = tempfile::tempdir().unwrap();
    let secret = home.path().join("level");
    fs::write(&secret, "debug\n").unwrap();
    let variables = [
        ("SEAWALL_SERVER__NODE", "from-a-variable"),
        ("SEAWALL_LOGGING__LEVEL_FILE", secret.to_str().unwrap()),
    ];
    let gateway = GatewayProcess::start_with(&home.path().join("data"), &variables).unwrap();
    let now = node(&gateway);
    assert_eq!(
        (&now["node"], &now["log_level"]),
        (&"from-a-variable".into(), &"debug".into())
    );
    assert!(!gateway.has_logged("unknown environment variable"));

    for (name, expected) in [
        ("SEAWALL_LIMITS__HEAD_BYTE_MAX", "is not a setting"),
        ("SEAWALL_LIMITS__HEAD_BYTES_MAX", "expected"),
    ] {
        let mut command = seawall();
        command.current_dir(home.path()).arg("serve").env(name, "hunter2");
        let refused = run(&mut command).unwrap();
        assert_refused(&refused, 2, &[name, expected]);
        assert!(!format!("{refused:?}").contains("hunter2"));
    }
}
