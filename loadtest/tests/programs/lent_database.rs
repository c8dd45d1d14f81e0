//! `loadtest run --database`: on a PostgreSQL that runs already, which keeps nothing of it.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use loadtest::{postgres::Postgres, server::without_settings};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection};

use crate::{LOADTEST, seawall, told};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where the address may stand, so that its password is in no list of processes.
const VARIABLE: &str = "SEAWALL_LOADTEST_DATABASE";

/// Some devices whose look-ups are slow, and a server of 2020 to go first.
const SCENARIO: &str = r#"
    name = "lent"
    about = "A PostgreSQL that runs already."
    devices = 60
    capacity_per_second = 1000
    thresholds = [
        "missing == 0",
        "lost_sessions == 0",
        "statements > 0",
        "naive.statements > 0",
        "rss_max_bytes > 0",
        "seawall.connect.all.admitted >= 60",
    ]
    [database]
    kind = "postgres"
    registered = 200
    slow_firmware = ["2.0.0"]
    [naive]
    pool = 4
    [[fleet]]
    name = "all"
    firmware = { "1.0.0" = 0.9, "2.0.0" = 0.1 }
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
"#;

/// A run that finds no PostgreSQL of its own.
fn run(scenario: &Path) -> Command {
    assert!(seawall().exists());
    let mut command = Command::new(LOADTEST);
    // Run by cargo, it would build the gateway again.
    without_settings(&mut command)
        .env_remove("CARGO")
        .env("SEAWALL_PG_BIN", "/nonexistent")
        .arg("run")
        .arg(scenario);
    command
}

fn written(folder: &Path, scenario: &str) -> std::path::PathBuf {
    let file = folder.join("scenario.toml");
    fs::write(&file, scenario).unwrap();
    file
}

async fn databases(postgres: &Postgres) -> Vec<String> {
    let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
    sqlx::query_scalar("SELECT datname FROM pg_database ORDER BY datname")
        .fetch_all(&mut connection)
        .await
        .unwrap()
}

/// Waits until the run has its database.
async fn await_database(postgres: &Postgres, run: &mut Child) {
    let deadline = Instant::now() + PATIENCE;
    while !databases(postgres)
        .await
        .iter()
        .any(|name| name.starts_with("seawall_loadtest_"))
    {
        assert!(run.try_wait().unwrap().is_none() && Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn ended(run: Child) -> Output {
    tokio::task::spawn_blocking(|| run.wait_with_output().unwrap())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_runs_in_a_database_of_its_own_on_a_server_that_runs_already() {
    let folder = tempfile::tempdir().unwrap();
    let postgres = Postgres::start(None).await.unwrap();
    let before = databases(&postgres).await;
    let scenario = written(folder.path(), SCENARIO);
    let json = folder.path().join("report.json");

    let mut child = run(&scenario)
        .arg("--json")
        .arg(&json)
        .env(VARIABLE, postgres.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    await_database(&postgres, &mut child).await;
    let command_line = fs::read_to_string(format!("/proc/{}/cmdline", child.id())).unwrap();
    let done = ended(child).await;

    let (told, url) = (told(&done), postgres.url());
    assert!(done.status.success(), "{told}");
    let password = url.split([':', '@']).nth(2).unwrap();
    assert!(password.len() > 20 && !told.contains(password) && !command_line.contains(password));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert!(report["slow_lookups"].is_null(), "its log is not ours to read");
    assert_eq!(databases(&postgres).await, before);
    let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(tables, 0, "the database that the address names is left alone");
    postgres.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_run_drops_its_database() {
    let folder = tempfile::tempdir().unwrap();
    let postgres = Postgres::start(None).await.unwrap();
    let before = databases(&postgres).await;
    // Nothing in it asks for PostgreSQL: the option does.
    let plain = SCENARIO.replace("[naive]\n    pool = 4\n", "");
    let plain = plain.replace("        \"naive.statements > 0\",\n", "");
    let plain = plain.replace(
        "    kind = \"postgres\"\n    registered = 200\n    slow_firmware = [\"2.0.0\"]\n",
        "",
    );
    let scenario = written(folder.path(), &plain);

    let mut child = run(&scenario)
        .args(["--database", &postgres.url()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    await_database(&postgres, &mut child).await;
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let done = ended(child).await;

    assert_eq!(done.status.code(), Some(3), "{}", told(&done));
    assert!(told(&done).contains("interrupted"), "{}", told(&done));
    assert_eq!(databases(&postgres).await, before);
    postgres.stop().await;
}

#[test]
fn what_a_lent_database_can_not_do_is_refused_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = "postgres://user:hidden@127.0.0.1:1/db";
    let action = "action = \"drop-all\"";
    for (from, to, named) in [
        (action, "action = { database = \"frozen\" }", "phase.storm.action"),
        (action, "action = { database = \"killed\" }", "phase.storm.action"),
        (
            action,
            "action = { database = { slow = { factor = 2 } } }",
            "phase.storm.action",
        ),
        ("registered = 200", "cores = 1", "database.cores"),
        ("missing == 0", "seawall.storm.slow_lookups == 0", "slow_lookups"),
    ] {
        let scenario = written(folder.path(), &SCENARIO.replace(from, to));

        let refused = run(&scenario).env(VARIABLE, nobody).output().unwrap();

        let told = told(&refused);
        assert_eq!(refused.status.code(), Some(2), "{told}");
        assert!(told.contains(named) && told.contains("--database"), "{told}");
        assert!(!told.contains("hidden"), "{told}");
    }
}

#[test]
fn address_that_is_none_is_refused_without_an_echo() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = written(folder.path(), SCENARIO);
    for url in [
        "mysql://user:hidden@127.0.0.1/db",
        "postgres://user:hidden@host:port/db",
        "postgres://user:hidden@127.0.0.1/db?dbname=other",
    ] {
        let refused = run(&scenario).args(["--database", url]).output().unwrap();

        let told = told(&refused);
        assert_eq!(refused.status.code(), Some(2), "{told}");
        assert!(told.contains("--database") && told.contains("postgres://"), "{told}");
        assert!(!told.contains("hidden"), "{told}");
    }
    let both = ["--gateway", "ws://127.0.0.1:1", "--ops", "http://127.0.0.1:1"];
    let refused = run(&scenario)
        .args(both)
        .env("SEAWALL_TOKEN", "x")
        .env(VARIABLE, "postgres://u:hidden@127.0.0.1/db")
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", told(&refused));
    assert!(!told(&refused).contains("hidden"), "{}", told(&refused));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn account_that_may_create_no_database_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let postgres = Postgres::start(None).await.unwrap();
    let mut connection = PgConnection::connect_with(&postgres.options()).await.unwrap();
    sqlx::raw_sql("CREATE ROLE small LOGIN PASSWORD 'hidden'")
        .execute(&mut connection)
        .await
        .unwrap();
    let url = postgres.url();
    let url = format!("postgres://small:hidden@{}", url.split_once('@').unwrap().1);
    let scenario = written(folder.path(), SCENARIO);

    let refused = run(&scenario).env(VARIABLE, url).output().unwrap();

    let told = told(&refused);
    assert_eq!(refused.status.code(), Some(3), "{told}");
    assert!(
        told.contains("CREATEDB") && told.contains("permission denied"),
        "{told}"
    );
    assert!(!told.contains("hidden"), "{told}");
    postgres.stop().await;
}
