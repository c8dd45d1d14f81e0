//! Two devices with one id: counted, with an alarm.

use serde_json::{Value, json};

use super::rig::Gateway;
use crate::harness::raw::Device;

#[test]
fn devices_that_replace_each_other_raise_an_alarm_that_names_their_id() {
    let gateway = Gateway::start();
    let (id, secret) = gateway.register(json!({}));
    let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let readiness = || gateway.raw("GET", "/readyz", &[], "");
    let figure = |series: &str| {
        let text = gateway.raw("GET", "/metrics", &[], "").text;
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.unwrap_or_default().trim().to_owned()
    };
    let has_reason = || {
        readiness().json()["reasons"]
            .as_array()
            .unwrap()
            .contains(&json!("duplicate_id"))
    };

    // Each replaces the previous one, which is still connected; the first replaces none.
    let mut fighting = Vec::new();
    for _ in 0..6 {
        fighting.push(gateway.block_on(Device::connect(gateway.device_address(), &[&identity])));
    }

    gateway.eventually(has_reason);

    let answer = readiness();
    assert_eq!((answer.status, &answer.json()["ready"]), (200, &Value::Bool(true)));
    assert_eq!(figure("seawall_duplicate_ids "), "1");
    let told = format!("{:?}", gateway.state().events.after(0, 1_000, usize::MAX));
    assert!(told.contains("duplicate_id") && told.contains(&id), "{told}");
}
