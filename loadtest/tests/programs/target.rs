//! `loadtest run --target`: which mistakes are named, what stays there, and when a run stops itself.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use firmware_sim::{
    connection::{Connection, DeviceConfig},
    identity::{Identity, Lines, read_devices},
};
use futures_util::{SinkExt as _, StreamExt as _};
use loadtest::{process::Slowness, server::without_settings};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::{LOADTEST, running_gateway::Gateway, schema, seawall, told};

const DEADLINE: Duration = Duration::from_secs(60);

/// A fleet of 20 that connects and drops, then holds.
const SCENARIO: &str = r#"
    name = "target"
    about = "A gateway that runs already."
    devices = 20
    capacity_per_second = 1000
    thresholds = ["missing == 0", "lost_sessions == 0"]
    [[fleet]]
    name = "all"
    firmware = { "1.0.0" = 1.0 }
    [[phase]]
    name = "connect"
    seconds = 30
    until = "connected"
    action = { connect = { per_second = 200 } }
    [[phase]]
    name = "storm"
    seconds = 60
    until = "connected"
    action = "drop-all"
    [[phase]]
    name = "hold"
    seconds = 1
"#;

/// The machine is shared with other tests: lag is judged only where a test is about it.
const ANY_LAG: [&str; 2] = ["--max-lag", "1h"];

struct Place {
    folder: tempfile::TempDir,
    gateway: Gateway,
}

impl Place {
    async fn new() -> Self {
        Self::with(&[]).await
    }

    async fn with(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gateway = Gateway::start_with(folder.path(), None, arguments).await;
        fs::write(folder.path().join("token"), &gateway.token).unwrap();
        Self { folder, gateway }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn scenario(&self, text: &str) -> PathBuf {
        let file = self.path("scenario.toml");
        fs::write(&file, text).unwrap();
        file
    }

    /// Devices that are registered at the gateway, in a file.
    fn seeded(&self, count: usize) -> PathBuf {
        let file = self.path("devices.csv");
        let done = without_settings(&mut Command::new(seawall()))
            .args(["devices", "seed", "--count", &count.to_string(), "--out"])
            .arg(&file)
            .env("SEAWALL_URL", &self.gateway.ops)
            .env("SEAWALL_TOKEN", &self.gateway.token)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", told(&done));
        file
    }

    /// A run against this gateway. Later arguments win.
    fn command(&self, scenario: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(LOADTEST);
        without_settings(&mut command)
            .env_remove("CARGO")
            .arg("run")
            .arg(scenario)
            .args(arguments)
            .arg("--token-file")
            .arg(self.path("token"));
        if !arguments.contains(&"--target") {
            command.args(["--target", &self.gateway.url]);
        }
        if !arguments.contains(&"--ops") {
            command.args(["--ops", &self.gateway.ops]);
        }
        if !arguments.contains(&"--max-lag") {
            command.args(ANY_LAG);
        }
        command
    }

    async fn run(&self, scenario: &Path, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = self.command(scenario, arguments);
        let done = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        (done.status.code(), told(&done))
    }

    fn start(&self, scenario: &Path, arguments: &[&str]) -> Child {
        let mut command = self.command(scenario, arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn sessions(&self) -> u64 {
        let nodes = self.gateway.items("nodes");
        nodes[0]["sessions"].as_u64().unwrap()
    }

    async fn eventually(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < DEADLINE, "{what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Devices of somebody else.
    async fn others(&self, identities: &[Identity], firmware: &str) -> Vec<Connection> {
        let mut connections = Vec::new();
        for identity in identities {
            let device = DeviceConfig::new(identity.id, &identity.secret).firmware(firmware);
            connections.push(Connection::open(&self.gateway.url, &device).await.unwrap());
        }
        connections
    }
}

fn identities(file: &Path) -> Vec<Identity> {
    read_devices(fs::File::open(file).unwrap(), Lines::default()).unwrap()
}

async fn ended(run: Child) -> Output {
    tokio::task::spawn_blocking(|| run.wait_with_output().unwrap())
        .await
        .unwrap()
}

fn report(path: &Path) -> Value {
    let report = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(schema::faults(&report), Vec::<String>::new());
    report
}

/// A WebSocket server that is not a Seawall: it accepts everyone.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
                    return;
                };
                while let Some(Ok(message)) = socket.next().await {
                    if socket.send(message).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_named_with_what_to_do() {
    let place = Place::new().await;
    let scenario = place.scenario(SCENARIO);
    let (url, ops) = (place.gateway.url.clone(), place.gateway.ops.clone());
    let host = url.strip_prefix("ws://").unwrap();
    let (wrong_path, secure, secure_ops) = (
        format!("{url}/v2/devices"),
        format!("wss://{host}"),
        ops.replace("http://", "https://"),
    );
    let swapped = (ops.replace("http://", "ws://"), url.replace("ws://", "http://"));
    let echo = echo().await;
    let (echo_url, echo_ops) = (format!("ws://{echo}/v1/connect"), format!("http://{echo}"));
    let junit = place.path("junit.xml");

    for (arguments, status, words) in [
        (
            ["--target", "ws://127.0.0.1:1"],
            3,
            ["nothing listens there", "--target ws://127.0.0.1:1"],
        ),
        (
            ["--ops", "http://127.0.0.1:1"],
            3,
            ["nothing listens there", "--ops http://127.0.0.1:1"],
        ),
        (["--target", &wrong_path], 3, ["404", "/v1/connect"]),
        (["--target", &swapped.0], 3, ["--target", "404"]),
        (["--ops", &swapped.1], 3, ["is the address for devices", "--ops"]),
        (["--target", &secure], 3, ["does not use TLS", "ws://"]),
        (["--ops", &secure_ops], 3, ["does not use TLS", "http://"]),
        (["--target", &echo_url], 3, ["not a Seawall", "without a credential"]),
        (["--ops", &echo_ops], 3, ["not the API of a Seawall", "--ops"]),
        (["--target", "ws://192.0.2.1:80"], 2, ["--confirm-target", "192.0.2.1"]),
        (
            ["--target", "wss://does-not-exist.invalid"],
            3,
            ["does-not-exist.invalid", "DNS"],
        ),
        (["--max-per-second", "100"], 2, ["phase `connect`", "--max-per-second"]),
        (["--ca", "/nonexistent"], 2, ["--ca", "/nonexistent"]),
    ] {
        let arguments = [arguments[0], arguments[1], "--junit", junit.to_str().unwrap()];
        // Authorities are read for TLS only.
        let arguments = if arguments[0] == "--ca" {
            [&arguments[..], &["--target", &secure]].concat()
        } else {
            arguments.to_vec()
        };
        let (code, why) = place.run(&scenario, &arguments).await;

        assert_eq!(code, Some(status), "{arguments:?}: {why}");
        assert!(words.iter().all(|word| why.contains(word)), "{arguments:?}: {why}");
        assert!(!why.contains(&place.gateway.token));
        assert!(fs::read_to_string(&junit).unwrap().contains("<error message="), "{why}");
    }
    assert_eq!(
        place.gateway.items("devices?limit=100"),
        serde_json::json!([]),
        "nothing was done there"
    );
    place.gateway.stop().await;
}

/// A server that others use: `PYTHON_WEBSOCKETS` names a Python with the `websockets` package; `./test` installs it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_websockets_server_is_not_taken_for_a_seawall() {
    let Some(python) = std::env::var_os("PYTHON_WEBSOCKETS") else {
        println!("PYTHON_WEBSOCKETS names no program: not run");
        return;
    };
    let place = Place::new().await;
    let scenario = place.scenario(SCENARIO);
    let script = "import asyncio, websockets\n\
        async def echo(socket):\n    async for message in socket: await socket.send(message)\n\
        async def main():\n    async with websockets.serve(echo, '127.0.0.1', 0) as server:\n        \
        print(server.sockets[0].getsockname()[1], flush=True)\n        await asyncio.Future()\n\
        asyncio.run(main())";
    let mut server = Command::new(python)
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut port = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.take().unwrap()), &mut port).unwrap();
    let (url, ops) = (
        format!("ws://127.0.0.1:{}/v1/connect", port.trim()),
        format!("http://127.0.0.1:{}", port.trim()),
    );

    let as_target = place.run(&scenario, &["--target", &url]).await;
    let as_ops = place.run(&scenario, &["--ops", &ops]).await;
    server.kill().unwrap();
    server.wait().unwrap();

    assert!(
        as_target.0 == Some(3) && as_target.1.contains("not a Seawall"),
        "{as_target:?}"
    );
    assert!(
        as_ops.0 == Some(3) && as_ops.1.contains("not the API of a Seawall"),
        "{as_ops:?}"
    );
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_with_tls_is_driven_by_the_authority_that_is_given() {
    let keys = tempfile::tempdir().unwrap();
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, key) = (keys.path().join("cert.pem"), keys.path().join("key.pem"));
    fs::write(&cert, certified.cert.pem()).unwrap();
    fs::write(&key, certified.signing_key.serialize_pem()).unwrap();
    let tls = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
    let place = Place::with(&tls).await;
    let scenario = place.scenario(SCENARIO);
    let port = place.gateway.url.rsplit(':').next().unwrap().to_owned();
    let named = format!("wss://localhost:{port}/v1/connect");
    let by_address = format!("wss://127.0.0.1:{port}/v1/connect");
    let ca = ["--ca", cert.to_str().unwrap()];

    let unknown = place.run(&scenario, &["--target", &named]).await;
    assert!(unknown.0 == Some(3) && unknown.1.contains("--ca"), "{unknown:?}");
    let other_name = place
        .run(&scenario, &[&["--target", &by_address], &ca[..]].concat())
        .await;
    assert!(
        other_name.0 == Some(3) && other_name.1.contains("another name"),
        "{other_name:?}"
    );
    let plain = place.run(&scenario, &[]).await;
    assert!(plain.0 == Some(3) && plain.1.contains("wss://"), "{plain:?}");
    let known = place.run(&scenario, &[&["--target", &named], &ca[..]].concat()).await;
    assert_eq!(known.0, Some(0), "{}", known.1);
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_a_file_are_driven_and_no_secret_is_told() {
    let place = Place::new().await;
    let scenario = place.scenario(&SCENARIO.replace("devices = 20", "devices = 30"));
    let file = place.seeded(20);
    let url = format!("{}/v1/connect?key=hidden-in-the-query", place.gateway.url);
    let outputs = ["report.json", "junit.xml", "report.html", "summary.md"].map(|name| place.path(name));
    let [json, junit, html, markdown] = outputs.each_ref().map(|path| path.to_str().unwrap());

    let run = place.start(
        &scenario,
        &[
            "--target",
            &url,
            "--devices-file",
            file.to_str().unwrap(),
            "--json",
            json,
            "--junit",
            junit,
            "--html",
            html,
            "--markdown",
            markdown,
        ],
    );
    let command_line = fs::read_to_string(format!("/proc/{}/cmdline", run.id())).unwrap();
    let done = ended(run).await;

    let mut texts = vec![told(&done), command_line.replace("hidden-in-the-query", "")];
    assert_eq!(done.status.code(), Some(0), "{}", texts[0]);
    assert!(texts[0].contains("20 of the scenario's 30 devices"), "{}", texts[0]);
    assert_eq!(
        place.gateway.items("devices?limit=100").as_array().unwrap().len(),
        20,
        "none was registered"
    );
    let report = report(&outputs[0]);
    assert_eq!(report["target"], format!("{}/v1/connect", place.gateway.url));
    let command = report["command"].as_str().unwrap();
    assert!(
        command.contains("--devices-file") && command.contains("--token-file"),
        "{command}"
    );
    texts.extend(outputs.iter().map(|path| fs::read_to_string(path).unwrap()));
    let secrets: Vec<String> = identities(&file)
        .iter()
        .map(|device| device.secret.to_string())
        .collect();
    for text in &texts {
        assert!(
            !text.contains(&place.gateway.token) && !text.contains("hidden-in-the-query"),
            "{text}"
        );
        assert!(!secrets.iter().any(|secret| text.contains(secret)), "{text}");
    }

    // A file of another gateway.
    let secret = "another-secret-of-16";
    fs::write(&file, format!("id,secret\n{},{secret}\n", uuid::Uuid::new_v4())).unwrap();
    let (code, why) = place.run(&scenario, &["--devices-file", file.to_str().unwrap()]).await;
    assert_eq!(code, Some(3), "{why}");
    assert!(
        why.contains("does not know the first device") && !why.contains(secret),
        "{why}"
    );
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_stops_when_other_devices_lose_their_sessions() {
    let place = Place::new().await;
    let others = place.others(&identities(&place.seeded(20)), "9.0.0").await;
    let scenario = place.scenario(&SCENARIO.replace("seconds = 1\n", "seconds = 300\n"));
    let (json, junit) = (place.path("report.json"), place.path("junit.xml"));

    let run = place.start(
        &scenario,
        &["--json", json.to_str().unwrap(), "--junit", junit.to_str().unwrap()],
    );
    place.eventually("all are connected", || place.sessions() == 40).await;
    for connection in others.into_iter().take(10) {
        connection.abort();
    }
    let begun = Instant::now();
    let done = ended(run).await;

    assert_eq!(done.status.code(), Some(3), "{}", told(&done));
    assert!(
        told(&done).contains("have lost their sessions") && told(&done).contains("STOPPED"),
        "{}",
        told(&done)
    );
    assert!(begun.elapsed() < Duration::from_secs(30), "at the first sign");
    assert_eq!(report(&json)["verdict"], "stopped");
    assert!(
        fs::read_to_string(&junit)
            .unwrap()
            .contains("failures=\"0\" errors=\"1\"")
    );
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_that_would_refuse_other_devices_is_not_made() {
    let place = Place::new().await;
    let others = place.others(&identities(&place.seeded(21)), "1.0.0").await;
    let block = r#"action = { block = { range = ">=1", evict = true } }"#;
    let scenario = place.scenario(&format!("{SCENARIO}    {block}\n"));
    // The gateway counts its sessions by version once a second.
    place
        .eventually("the others are counted", || {
            let rows = place.gateway.items("firmware");
            let rows = rows.as_array().unwrap().clone();
            rows.iter()
                .any(|row| row["firmware"] == "1.0.0" && row["connected"] == 21)
        })
        .await;

    let (code, why) = place.run(&scenario, &[]).await;

    assert_eq!(code, Some(3), "{why}");
    assert!(why.contains("would refuse") && why.contains("only 20 of them"), "{why}");
    assert_eq!(place.gateway.items("rules"), serde_json::json!([]));
    assert_eq!(place.sessions(), 21);
    drop(others);
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_run_leaves_no_rule_and_no_session() {
    let place = Place::new().await;
    let block = r#"action = { block = { range = ">=1" } }"#;
    let scenario = SCENARIO.replace("seconds = 1\n", "seconds = 300\n");
    let scenario = place.scenario(&format!("{scenario}    {block}\n"));

    let run = place.start(&scenario, &[]);
    place
        .eventually("the rule is there", || {
            place.gateway.items("rules") != serde_json::json!([])
        })
        .await;
    let rule = place.gateway.items("rules")[0].clone();
    kill_process(Pid::from_child(&run), Signal::INT).unwrap();
    let done = ended(run).await;

    assert_eq!(done.status.code(), Some(3), "{}", told(&done));
    assert!(told(&done).contains("interrupted"), "{}", told(&done));
    assert!(
        rule["expires_at"].is_string(),
        "it ends by itself, had the run been killed: {rule}"
    );
    assert_eq!(place.gateway.items("rules"), serde_json::json!([]));
    place
        .eventually("the sessions are over", || place.sessions() == 0)
        .await;
    place.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starved_generator_gives_no_verdict() {
    let place = Place::new().await;
    let scenario = place.scenario(&SCENARIO.replace("seconds = 1\n", "seconds = 3\n"));
    let junit = place.path("junit.xml");
    let arguments = ["--max-lag", "20ms", "--junit", junit.to_str().unwrap()];

    // It runs for a twentieth of the time.
    let run = place.start(&scenario, &arguments);
    let slowness = Slowness::begin(Pid::from_child(&run), 20.0);
    let slow = ended(run).await;
    drop(slowness);
    assert_eq!(slow.status.code(), Some(4), "{}", told(&slow));
    assert!(
        told(&slow).contains("INCONCLUSIVE") && told(&slow).contains("its own lag"),
        "{}",
        told(&slow)
    );
    let page = fs::read_to_string(&junit).unwrap();
    assert!(
        page.contains("failures=\"0\" errors=\"") && page.contains("verdict: INCONCLUSIVE"),
        "{page}"
    );

    // Its limit of open files falls while it runs: connections that drop find no file to return with.
    let scenario = place.scenario(&SCENARIO.replace(
        "[[phase]]\n    name = \"storm\"",
        "[[phase]]\n    name = \"calm\"\n    seconds = 2\n    [[phase]]\n    name = \"storm\"",
    ));
    let run = place.start(&scenario, &["--seconds", "storm=5"]);
    place.eventually("all are connected", || place.sessions() == 20).await;
    let few = Rlimit {
        current: Some(12),
        maximum: Some(12),
    };
    prlimit(Some(Pid::from_child(&run)), Resource::Nofile, few).unwrap();
    let done = ended(run).await;
    assert_eq!(done.status.code(), Some(4), "{}", told(&done));
    assert!(told(&done).contains("had no socket"), "{}", told(&done));
    place.gateway.stop().await;
}
