//! A gateway process that is killed while devices are connected: nobody is shown online who may not be, until they
//! return.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::task::{block_in_place, spawn_blocking};

use crate::{
    harness::{
        devices::{attempt, device, id},
        pg,
        process::{GatewayProcess, run},
        wait::{eventually, eventually_async},
    },
    scarce::import,
};

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_a_killed_gateway_are_unknown_until_they_return_sqlite() {
    killed(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_a_killed_gateway_are_unknown_until_they_return_postgres() {
    let url = pg::shared().database().await.unwrap();
    killed(&["--database", url.expose()]).await;
}

async fn killed(args: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let start = || {
        let (data_dir, args) = (home.path().join("data"), args.iter().map(|arg| (*arg).to_owned()));
        let args: Vec<String> = args.collect();
        spawn_blocking(move || start_on(&data_dir, &args))
    };
    let mut gateway = start().await.unwrap();
    block_in_place(|| import(&gateway, 0..3));
    let _zero = attempt(gateway.addresses.devices, device(0)).await.admitted();
    let _one = attempt(gateway.addresses.devices, device(1)).await.admitted();
    let metric = |gateway: &GatewayProcess, series: &str| gateway.metric(series).unwrap();
    eventually(|| metric(&gateway, "seawall_presence_devices{state=\"online\"}") == 2).await;
    eventually(|| metric(&gateway, "seawall_presence_queue ") == 0).await;

    gateway.signal(Signal::KILL).unwrap();
    block_in_place(|| gateway.wait(std::time::Duration::from_secs(10))).unwrap();
    let gateway = start().await.unwrap();

    eventually(|| metric(&gateway, "seawall_presence_devices{state=\"unknown\"}") == 2).await;
    assert_eq!(metric(&gateway, "seawall_presence_devices{state=\"online\"}"), 0);
    for number in [0, 1] {
        let shown = presence(&gateway, number);
        assert_eq!(
            (&shown["state"], &shown["cause"]),
            (&json!("unknown"), &json!("node_restarted")),
            "{shown}"
        );
    }
    assert_eq!(presence(&gateway, 2)["cause"], "never_seen");

    let _back = attempt(gateway.addresses.devices, device(0)).await.admitted();
    eventually(|| presence(&gateway, 0)["state"] == "online").await;
    let history = answer(&gateway, &["devices", "history", &id(0).to_string()]);
    let items = history["items"].as_array().unwrap();
    let states: Vec<&str> = items.iter().map(|item| item["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["online", "unknown", "online"], "{history}");
    // The second one has not returned, and the third was never seen.
    let tenant = json!({"key": "default", "online": 1, "offline": 0, "unknown": 2});
    eventually(|| answer(&gateway, &["presence", "--by", "tenant"])["items"] == json!([tenant])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_moved_while_its_node_was_dead_stays_online_when_that_returns() {
    let url = pg::shared().database().await.unwrap();
    let (home, other_home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let start = |home: &Path| {
        let data_dir = home.join("data");
        let args = ["--database", url.expose()].map(str::to_owned);
        spawn_blocking(move || start_on(&data_dir, &args))
    };
    let mut killed = start(home.path()).await.unwrap();
    let other = start(other_home.path()).await.unwrap();
    block_in_place(|| import(&killed, 0..2));
    let _zero = attempt(killed.addresses.devices, device(0)).await.admitted();
    let _one = attempt(killed.addresses.devices, device(1)).await.admitted();
    let metric = |gateway: &GatewayProcess, series: &str| gateway.metric(series).unwrap();
    eventually(|| metric(&killed, "seawall_presence_devices{state=\"online\"}") == 2).await;
    eventually(|| metric(&killed, "seawall_presence_queue ") == 0).await;
    eventually(|| presence(&other, 1)["state"] == "online").await;

    killed.signal(Signal::KILL).unwrap();
    block_in_place(|| killed.wait(std::time::Duration::from_secs(10))).unwrap();
    let _moved = attempt(other.addresses.devices, device(0)).await.admitted();
    // The gauge of the queue is up to a second old: the node that returns must not read before this is written.
    let is_written = async || {
        let mut connection = PgConnection::connect(url.expose()).await.unwrap();
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM presence_history");
        count.fetch_one(&mut connection).await.unwrap() == 3
    };
    eventually_async(is_written).await;
    let back = start(home.path()).await.unwrap();

    eventually(|| presence(&other, 1)["cause"] == "node_restarted").await;
    eventually(|| metric(&back, "seawall_presence_queue ") == 0).await;
    for gateway in [&back, &other] {
        assert_eq!(presence(gateway, 0)["state"], "online");
        assert_eq!(presence(gateway, 1)["cause"], "node_restarted");
    }
    eventually(|| metric(&back, "seawall_presence_devices{state=\"unknown\"}") == 1).await;

    // The other one returns to the other node.
    let _returned = attempt(other.addresses.devices, device(1)).await.admitted();
    eventually(|| presence(&back, 1)["state"] == "online").await;
    let history = answer(&back, &["devices", "history", &id(1).to_string()]);
    let items = history["items"].as_array().unwrap();
    let states: Vec<&str> = items.iter().map(|item| item["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["online", "unknown", "online"], "{history}");
    let history = answer(&back, &["devices", "history", &id(0).to_string()]);
    let items = history["items"].as_array().unwrap();
    assert!(items.iter().all(|item| item["state"] == "online"), "{history}");
}

fn start_on(data_dir: &Path, args: &[String]) -> GatewayProcess {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    GatewayProcess::start_on(data_dir, &args).unwrap()
}

fn presence(gateway: &GatewayProcess, number: u32) -> Value {
    answer(gateway, &["devices", "show", &id(number).to_string()])["presence"].clone()
}

/// What the command line prints.
fn answer(gateway: &GatewayProcess, args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    let output = block_in_place(|| run(&mut gateway.operator(&args))).unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}
