//! A full disk under the data directory.

use std::{fs, io::Write, path::Path};

use serde_json::Value;
use tokio::task::spawn_blocking;

use super::super::harness::process::{GatewayProcess, run};
use crate::harness::{
    devices::{assert_alive, attempt, device, new_device, with_wrong_secret},
    skip::skip,
    wait::eventually,
};

/// Space for an empty database with its additional files, and for little more.
const DISK_BYTES: usize = 8 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_stops_rule_writes_only_and_needs_no_restart() {
    let Some(gateway) = spawn_blocking(|| GatewayProcess::start_on_small_disk(DISK_BYTES))
        .await
        .unwrap()
        .unwrap()
    else {
        skip("no private mounts on this machine (unshare --mount): no disk was filled");
        return;
    };
    let address = gateway.addresses.devices;
    import(&gateway, 0..3);
    let mut live = attempt(address, device(0)).await.admitted();

    let filler = gateway.data_dir().with_file_name("filler");
    fill(&filler);
    let refused = run(&mut gateway.operator(&["rules", "block", "=6.6.6", "--reason", "bad"])).unwrap();

    let complaint = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{complaint}");
    assert!(
        complaint.contains("disk is full") && complaint.contains("free space"),
        "{complaint}"
    );
    assert_eq!(rules(&gateway), 0, "nothing of it is in force");
    assert_alive(&mut live).await;
    let mut second = attempt(address, device(1).firmware("6.6.6")).await.admitted();
    attempt(address, with_wrong_secret(&device(2)))
        .await
        .refused_with(401, "unauthorized");
    // Gauges of the store are published every second.
    eventually(|| {
        gateway
            .metric("seawall_database_errors_total{operation=\"rules\"}")
            .unwrap()
            >= 1
    })
    .await;
    let is_told = || gateway.metric("seawall_faults{fault=\"disk_full\"}").unwrap() == 1;
    eventually(is_told).await;
    let alarms = gateway.log().unwrap().matches("\"alarm\":\"disk_full\"").count();
    assert_eq!(alarms, 1, "one line");

    fs::remove_file(&filler).unwrap();
    eventually(|| !is_told()).await;
    let made = run(&mut gateway.operator(&["rules", "block", "=6.6.6", "--reason", "bad", "--confirm"])).unwrap();

    assert!(made.status.success(), "{made:?}");
    assert_eq!(rules(&gateway), 1);
    attempt(address, device(2).firmware("6.6.6"))
        .await
        .refused_with(403, "firmware_blocked");
    assert_alive(&mut live).await;
    assert_alive(&mut second).await;
}

/// Writes until not a single byte fits.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    for len in [1 << 16, 1 << 10, 1] {
        while file.write_all(&vec![1; len]).is_ok() {}
    }
    assert_eq!(file.write(&[1]).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
}

fn rules(gateway: &GatewayProcess) -> usize {
    let listed = run(&mut gateway.operator(&["rules", "list", "--json"])).unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    listed["items"].as_array().unwrap().len()
}

/// Registers the devices with these numbers.
pub fn import(gateway: &GatewayProcess, numbers: std::ops::Range<u32>) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fleet.csv");
    let mut lines = "id,secret_sha256\n".to_owned();
    for number in numbers {
        let new = new_device(number);
        let hash: String = new.secret.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        lines.push_str(&format!("{},{hash}\n", new.id));
    }
    fs::write(&path, lines).unwrap();
    let imported = run(&mut gateway.operator(&["devices", "import", path.to_str().unwrap()])).unwrap();
    assert!(imported.status.success(), "{imported:?}");
}
