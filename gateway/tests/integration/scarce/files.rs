//! A gateway that is out of files (EMFILE at accept): it waits, logs it, and continues.

use std::{fs, time::Duration};

use firmware_sim::connection::Connection;
use rustix::process::{Resource, Rlimit, prlimit};
use tokio::{net::TcpStream, task::spawn_blocking, time::sleep};

use super::{
    super::harness::{authority::Authority, process::GatewayProcess},
    disk::import,
};
use crate::harness::{
    devices::{assert_alive, attempt, device},
    wait::{PATIENCE, eventually},
};

/// Files that the gateway may still open.
const FILES_LEFT: u64 = 4;
/// Silent connections, more than those files.
const SILENT: usize = 12;
/// Time for which it is out of files, and the maximum CPU time meanwhile. A loop without a pause would take all of it.
const OUT_OF_FILES_FOR: Duration = Duration::from_secs(2);
const CPU_MAX: Duration = Duration::from_millis(600);
/// A tick of /proc/PID/stat: USER_HZ is 100 on every Linux.
const TICK_MS: u64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn gateway_out_of_files_waits_without_spinning_and_recovers() {
    let gateway = spawn_blocking(|| GatewayProcess::start(&[])).await.unwrap().unwrap();
    let address = gateway.addresses.devices;
    import(&gateway, 0..2);
    let mut live = attempt(address, device(0)).await.admitted();
    let pid = gateway.pid().unwrap();
    let open = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()))
        .unwrap()
        .count();
    let limit = prlimit(None, Resource::Nofile, rustix::process::getrlimit(Resource::Nofile)).unwrap();
    let tight = Rlimit {
        current: Some(open as u64 + FILES_LEFT),
        maximum: limit.maximum,
    };
    prlimit(Some(pid), Resource::Nofile, tight).unwrap();

    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let waiting = tokio::spawn(attempt(address, device(1)));
    eventually(|| gateway.has_logged("accepting devices paused")).await;
    let before = cpu_time(pid.as_raw_nonzero().get());
    sleep(OUT_OF_FILES_FOR).await;
    let spent = cpu_time(pid.as_raw_nonzero().get()) - before;

    assert!(spent < CPU_MAX, "{spent:?} of CPU time in {OUT_OF_FILES_FOR:?}");
    assert_alive(&mut live).await;
    drop(silent);
    let mut second: Connection = tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap()
        .unwrap()
        .admitted();
    assert_alive(&mut second).await;
    eventually(|| gateway.has_logged("accepting devices resumed")).await;
    assert!(gateway.metric("seawall_accept_pauses_total").unwrap() >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_that_could_not_be_read_for_want_of_files_is_taken_once_there_are_some() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let args = ["--config".to_owned(), config.display().to_string()];
    let start = move || GatewayProcess::start(&args.each_ref().map(String::as_str));
    let gateway = spawn_blocking(start).await.unwrap().unwrap();
    let pid = gateway.pid().unwrap();
    let limit = prlimit(
        Some(pid),
        Resource::Nofile,
        rustix::process::getrlimit(Resource::Nofile),
    )
    .unwrap();
    let none_left = Rlimit {
        current: Some(1),
        maximum: limit.maximum,
    };
    prlimit(Some(pid), Resource::Nofile, none_left).unwrap();
    let renewed = authority.server();
    authority.write_server(&renewed);
    eventually(|| gateway.has_logged("TLS files not usable")).await;

    prlimit(Some(pid), Resource::Nofile, limit).unwrap();

    eventually(|| gateway.has_logged("TLS files reloaded")).await;
}

/// CPU time in user and kernel mode, of all its threads.
fn cpu_time(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    // utime and stime are the 14th and 15th field; the first two are before the parenthesis.
    let ticks: u64 = fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * TICK_MS)
}
