//! `loadtest run` against a gateway that runs already: a real process, that outlives the test's run and keeps nothing of it but devices.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use loadtest::{
    postgres::Postgres,
    process::{self, Process},
    server::without_settings,
};
use rustix::process::Signal;
use sqlx::{Connection, PgConnection};

use crate::{LOADTEST, seawall, told};

const START_MAX: Duration = Duration::from_secs(60);

/// Well-behaved devices that talk, and pairs that share an id; all drop once, and one version is blocked.
const SCENARIO: &str = r#"
    name = "running"
    about = "A gateway that runs already."
    devices = 60
    capacity_per_second = 1000
    groups = { talkers = ["1.0.0"], twins = ["2.0.0"], marked = ["3.0.0"] }
    thresholds = [
        "missing == 0",
        "lost_sessions == 0",
        "over_limit == 0",
        "in_flight_max <= limit",
        "statements > 0",
        "t100_seconds <= 30",
        "seawall.connect.all.admitted >= 60",
        "seawall.calm.talkers.sent > 20",
        "seawall.calm.talkers.acked >= 0.8 * seawall.calm.talkers.sent",
        "seawall.calm.twins.connected < seawall.calm.twins.devices",
        "seawall.calm.twins.attempts > 0",
        "seawall.block.marked.connected == 0",
        "seawall.block.marked.refused_firmware_blocked > 0",
    ]
    [[fleet]]
    name = "talkers"
    share = 0.5
    firmware = { "1.0.0" = 1.0 }
    messages_per_minute = 60
    [[fleet]]
    name = "twins"
    share = 0.2
    firmware = { "2.0.0" = 1.0 }
    profile = { duplicate-id = 1.0 }
    [[fleet]]
    name = "marked"
    share = 0.3
    firmware = { "3.0.0" = 1.0 }
    [[phase]]
    name = "connect"
    seconds = 30
    until = "connected"
    action = { connect = { per_second = 200 } }
    [[phase]]
    name = "calm"
    seconds = 3
    [[phase]]
    name = "storm"
    seconds = 60
    until = "connected"
    action = "drop-all"
    [[phase]]
    name = "block"
    seconds = 6
    action = { block = { range = ">=3", evict = true, retry_after = "1s" } }
"#;

pub struct Gateway {
    pub process: Process,
    pub url: String,
    pub ops: String,
    pub token: String,
}

impl Gateway {
    pub async fn start(folder: &Path) -> Self {
        Self::start_on(folder, None).await
    }

    async fn start_on(folder: &Path, database: Option<&str>) -> Self {
        Self::start_with(folder, database, &[]).await
    }

    /// With these arguments more, such as those of TLS for devices.
    pub async fn start_with(folder: &Path, database: Option<&str>, arguments: &[&str]) -> Self {
        let data = folder.join("data");
        let mut command = Command::new(seawall());
        without_settings(&mut command)
            .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(&data)
            .args(arguments);
        if let Some(database) = database {
            command.env("SEAWALL_DATABASE", database);
        }
        let mut process = Process::start("seawall", &mut command, &folder.join("log")).unwrap();
        let read = || serde_json::from_slice::<serde_json::Value>(&fs::read(data.join("addresses.json")).ok()?).ok();
        let addresses = process::await_from(&mut process, "addresses", START_MAX, read)
            .await
            .unwrap();
        let read = || {
            fs::read_to_string(data.join("admin.token"))
                .ok()
                .filter(|token| !token.trim().is_empty())
        };
        let token = process::await_from(&mut process, "token", START_MAX, read)
            .await
            .unwrap();
        let ops = format!("http://{}", addresses["ops"].as_str().unwrap());
        process::await_from(&mut process, "readiness", START_MAX, || {
            get(&format!("{ops}/readyz"), None).map(drop)
        })
        .await
        .unwrap();
        Self {
            process,
            url: format!("ws://{}", addresses["devices"].as_str().unwrap()),
            ops,
            token: token.trim().to_owned(),
        }
    }

    /// Items of an answer of its API.
    pub fn items(&self, path: &str) -> serde_json::Value {
        let text = get(&format!("{}/api/v1/{path}", self.ops), Some(&self.token)).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["items"].clone()
    }

    pub async fn stop(mut self) {
        self.process.stop(Signal::TERM, Duration::from_secs(30)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_runs_already_is_driven_and_keeps_no_rule() {
    let folder = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(folder.path()).await;
    let scenario = folder.path().join("running.toml");
    fs::write(&scenario, SCENARIO).unwrap();
    let json = folder.path().join("report.json");

    let done = run(&gateway, &scenario, &gateway.token, &json);

    assert!(done.status.success(), "{}", told(&done));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(
        (&report["passed"], &report["scenario"]),
        (&true.into(), &"running".into())
    );
    gateway.process.check().unwrap();
    assert_eq!(gateway.items("rules"), serde_json::json!([]));
    // 48 with ids of their own, and 12 in pairs.
    assert_eq!(gateway.items("devices?limit=100").as_array().unwrap().len(), 54);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_on_postgresql_is_driven_by_a_scenario_that_asks_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let postgres = Postgres::start(None).await.unwrap();
    let gateway = Gateway::start_on(folder.path(), Some(&postgres.url())).await;
    let scenario = folder.path().join("running.toml");
    let text = with_database("kind = \"postgres\"\n registered = 80");
    fs::write(
        &scenario,
        text.replace("\"missing == 0\"", "\"missing == 0\", \"rss_max_bytes > 0\""),
    )
    .unwrap();
    let json = folder.path().join("report.json");

    let done = run(&gateway, &scenario, &gateway.token, &json);

    assert!(done.status.success(), "{}", told(&done));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["not_judged"], serde_json::json!(["rss_max_bytes > 0"]));
    let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
    let devices: i64 = sqlx::query_scalar("SELECT count(*) FROM devices")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    // Of 60, 12 share ids in pairs.
    assert_eq!(devices, 54 + 20);
    gateway.stop().await;
    postgres.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_none_and_what_needs_a_database_of_its_own_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(folder.path()).await;
    let file = folder.path().join("scenario.toml");
    let json = folder.path().join("report.json");
    let refused = |scenario: &str, token: &str| {
        fs::write(&file, scenario).unwrap();
        let done = run(&gateway, &file, token, &json);
        (done.status.code(), told(&done))
    };

    let (status, why) = refused(SCENARIO, "not-a-token");
    assert_eq!(status, Some(3));
    assert!(why.contains("401") && why.contains("--token-file"), "{why}");
    let frozen =
        with_database("kind = \"postgres\"").replace("action = \"drop-all\"", "action = { database = \"frozen\" }");
    for (scenario, named) in [
        (with_database("kind = \"postgres\"\n [naive]\n pool = 4"), "`naive`"),
        (
            with_database("kind = \"postgres\"\n slow_firmware = [\"3.0.0\"]"),
            "`database.slow_firmware`",
        ),
        (with_database("kind = \"postgres\"\n cores = 1"), "`database.cores`"),
        (frozen, "`phase.storm.action`"),
    ] {
        let (status, why) = refused(&scenario, &gateway.token);

        assert_eq!(status, Some(2), "{why}");
        assert!(why.contains(named) && why.contains("--target"), "{why}");
    }
    assert!(!json.exists());
    gateway.stop().await;
}

/// The scenario with this `[database]`.
fn with_database(settings: &str) -> String {
    SCENARIO.replacen("[[fleet]]", &format!("[database]\n {settings}\n [[fleet]]"), 1)
}

fn run(gateway: &Gateway, scenario: &Path, token: &str, json: &Path) -> Output {
    without_settings(&mut Command::new(LOADTEST))
        .arg("run")
        .arg(scenario)
        .args(["--gateway", &gateway.url, "--ops", &gateway.ops])
        .arg("--json")
        .arg(json)
        .env("SEAWALL_TOKEN", token)
        .output()
        .unwrap()
}

/// The body of an answer of success.
fn get(url: &str, token: Option<&str>) -> Option<String> {
    let mut request = ureq::get(url);
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    request.call().ok()?.body_mut().read_to_string().ok()
}
