//! A log that is not read: standard error is a full pipe.

use std::{fs, time::Duration};

use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::Signal,
};
use tokio::task::{JoinSet, spawn_blocking};

use super::{super::harness::process::GatewayProcess, disk::import};
use crate::harness::{
    devices::{assert_alive, attempt, device, raw},
    wait::PATIENCE,
};

/// Attempts at a time; each logs a line.
const ATTEMPTS: usize = 100;
/// A gateway with lines that cannot be written waits a second for their reader at its end.
const END_MAX: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread")]
async fn unread_log_never_stops_the_gateway_and_what_it_lost_is_counted() {
    let home = tempfile::tempdir().unwrap();
    let (data, config) = (home.path().join("data"), home.path().join("seawall.toml"));
    fs::write(&config, "[logging]\nlevel = \"debug\"\n").unwrap();
    // The gateway's log goes to a pipe that is held open and never read.
    let pipe = data.with_extension("log");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _unread = fs::File::options().read(true).write(true).open(&pipe).unwrap();
    let start = move || GatewayProcess::start_on(&data, &["--config", config.to_str().unwrap()]);
    let mut gateway = spawn_blocking(start).await.unwrap().unwrap();
    let address = gateway.addresses.devices;
    import(&gateway, 0..1);

    let deadline = std::time::Instant::now() + 4 * PATIENCE;
    while gateway.metric("seawall_dropped_total{buffer=\"log\"}").unwrap() == 0 {
        assert!(std::time::Instant::now() < deadline, "nothing was dropped");
        let mut attempts = JoinSet::new();
        for _ in 0..ATTEMPTS {
            attempts.spawn(raw(address, b"GET /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n"));
        }
        assert!(attempts.join_all().await.iter().all(|status| *status >= 400));
    }

    assert_alive(&mut attempt(address, device(0)).await.admitted()).await;
    gateway.signal(Signal::TERM).unwrap();
    let status = spawn_blocking(move || gateway.wait(END_MAX)).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}
