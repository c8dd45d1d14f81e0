//! `GET /alarms`.

use serde_json::json;

use super::rig::Gateway;

#[test]
fn alarms_are_listed_while_they_are_active() {
    let gateway = Gateway::start();
    let state = gateway.state();
    assert_eq!(gateway.get("/api/v1/alarms").json()["items"], json!([]));

    state.alarms.set_for("costly_cohort", "box/1.0", true, "slow");
    state.alarms.set("disk_full", true, "no room");
    let active = gateway.all("/api/v1/alarms?", 1);
    state.alarms.set("disk_full", false, "room again");
    let left = gateway.all("/api/v1/alarms?", 10);

    let shown: Vec<_> = active
        .iter()
        .map(|alarm| json!([alarm["kind"], alarm["subject"], alarm["severity"], alarm["detail"]]))
        .collect();
    assert_eq!(
        shown,
        [
            json!(["disk_full", "node", "critical", "no room"]),
            json!(["costly_cohort", "box/1.0", "warning", "slow"]),
        ]
    );
    assert!(active[0]["since"].is_string());
    assert_eq!(left.len(), 1);
}
