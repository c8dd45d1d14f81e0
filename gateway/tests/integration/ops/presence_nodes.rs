//! Presence on two nodes that share a database: how one shows a device whose socket the other has.

use std::time::Duration;

use seawall_gateway::{
    fleet::history::{Lost, Restored, Stored},
    store::{PresenceWrite, Reason, StoredPresence},
    tasks::presence_returns::settle,
};
use seawall_proto::{
    epoch::{NodeTag, SessionIds},
    id::{DeviceId, SessionId},
    presence::{Cause, Known, Presence},
    time::WallTime,
};
use serde_json::{Value, json};

use super::{
    presence::{counts, history, presence, states},
    rig::{Gateway, V1},
};
use crate::harness::pg;

const HOUR: Duration = Duration::from_hours(1);

/// Two nodes that are ready.
fn two_nodes() -> (Gateway, Gateway) {
    let url = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(pg::shared().database())
        .unwrap();
    let start = |name: &str| {
        let gateway = Gateway::start_on(Some(&url), &format!("[server]\nnode = \"{name}\"\n"));
        gateway.eventually(|| gateway.raw("GET", "/readyz", &[], "").status == 200);
        gateway
    };
    (start("a"), start("b"))
}

fn is_written(gateway: &Gateway) {
    gateway.eventually(|| gateway.state().history.queue().is_empty());
}

fn parsed(id: &str) -> DeviceId {
    DeviceId::from_uuid(id.parse().unwrap())
}

fn stored(gateway: &Gateway, id: &str) -> StoredPresence {
    let devices = [parsed(id)];
    let among = gateway.state().store.presence_among(&devices);
    gateway.block_on(among).unwrap().remove(0)
}

/// Restores a state whose socket is lost, as the task does that reads them.
fn restore(gateway: &Gateway, id: &str, cause: Cause, concluded_from: Option<u64>) -> Restored {
    let row = stored(gateway, id);
    let state = gateway.state();
    let cohort = state.cohorts.intern(row.model.as_deref(), row.firmware.as_deref());
    let group = state
        .history
        .groups()
        .of(&cohort, &row.tenant.as_str().into(), row.registered_model.as_deref());
    let stored = Stored {
        device: row.device,
        known: row.known,
        reason: row.reason,
        group: &group,
    };
    let at = state.clock.wall();
    state.history.restore(
        stored,
        Lost {
            cause,
            at,
            concluded_from,
        },
    )
}

fn listed(gateway: &Gateway, query: &str, id: &str) -> Value {
    let items = gateway.all(&format!("/api/v1/devices?{query}&"), 100);
    let found = items.into_iter().find(|item| item["id"] == id);
    found.map_or(Value::Null, |item| item["presence"].clone())
}

#[test]
fn device_that_comes_from_a_node_whose_clock_is_ahead_is_online_on_both() {
    let (ahead, here) = two_nodes();
    let later = ahead.state().clock.wall() + HOUR;
    let seen = SessionIds::new(NodeTag(1), None).next(later);
    ahead.state().sessions.ids().observe(seen, later);
    let (id, secret) = ahead.register(json!({}));
    drop(ahead.connect(&id, &secret, &[V1]));
    ahead.eventually(|| ahead.state().sessions.is_empty());
    is_written(&ahead);
    assert_eq!(presence(&here, &id)["state"], "offline");

    let device = here.connect(&id, &secret, &[V1]);

    assert_eq!(presence(&here, &id)["state"], "online");
    here.eventually(|| presence(&ahead, &id)["state"] == "online");
    assert_eq!(presence(&ahead, &id)["node"], "b");
    assert_eq!(presence(&here, &id)["state"], "online");
    for gateway in [&here, &ahead] {
        assert_eq!(listed(gateway, "tenant=default", &id)["state"], "online");
    }
    drop(device);
    for gateway in [&here, &ahead] {
        gateway.eventually(|| presence(gateway, &id)["state"] == "offline");
        gateway.eventually(|| states(&history(gateway, &id))[..2] == ["offline", "online"]);
    }
    // And the next one is newer from its beginning.
    let _device = here.connect(&id, &secret, &[V1]);
    assert!(here.state().sessions.get(parsed(&id)).unwrap().id > seen);
}

#[test]
fn device_of_another_node_is_not_called_never_seen() {
    let (a, b) = two_nodes();
    let (id, _device) = a.connected(&[V1]);
    let (other, _) = a.register(json!({}));
    is_written(&a);

    let shown = listed(&b, "tenant=default", &id);

    assert_eq!((&shown["state"], &shown["node"]), (&json!("online"), &json!("a")));
    assert_eq!(listed(&b, "tenant=default", &other)["cause"], "never_seen");
    assert_eq!(listed(&b, "state=unknown", &id), Value::Null);
    assert_eq!(listed(&b, "state=unknown", &other)["cause"], "never_seen");
}

#[test]
fn node_that_was_found_gone_has_the_last_word_about_its_devices() {
    let (owner, other) = two_nodes();
    let (id, _device) = owner.connected(&[V1]);
    is_written(&owner);
    let store = &other.state().store;
    let nodes = other.block_on(store.presence_nodes()).unwrap();
    let row = nodes.iter().find(|node| node.node == "a").unwrap();
    let written = row.sign.written.unwrap();

    let gone = store.presence_node_gone(row.sign.boot.node, written);
    assert!(other.block_on(gone).unwrap());
    let number = stored(&other, &id).number;
    let restored = restore(&other, &id, Cause::NodeLost, Some(number));
    assert_eq!(restored, Restored::Awaited { is_new: true });

    // It learns of it when it notes that it lives, within ten seconds.
    other.eventually(|| states(&history(&other, &id)) == ["online", "unknown", "online"]);
    assert_eq!(presence(&other, &id)["state"], "online");
    assert_eq!(presence(&owner, &id)["state"], "online");
    other.block_on(settle(other.state(), &[parsed(&id)])).unwrap();
    assert_eq!(presence(&other, &id)["state"], "online", "it is not given up");
    assert_eq!(other.state().history.groups().total().total(), 0);
}

#[test]
fn device_that_did_not_return_is_offline_unless_another_node_has_seen_it() {
    let (here, other) = two_nodes();
    let node = here.state().boot.node;
    let hour_ago = WallTime::from_unix_ms(here.state().started.as_unix_ms() - 3_600_000);
    let epoch = SessionIds::new(node, None).next(hour_ago);
    let [(away, _), (moved, secret)] = [json!({}), json!({})].map(|body| here.register(body));
    let online = |id: &str| PresenceWrite {
        device: parsed(id),
        known: Known {
            epoch,
            presence: Presence::Online,
            since: hour_ago,
        },
        at: hour_ago,
        reason: Reason::CONNECTED,
        number: 4,
        tenant: "default",
        model: None,
        firmware: None,
    };
    let writes = [online(&away), online(&moved)];
    let written = here.state().store.presence_write(&writes, SessionId(u64::MAX));
    here.block_on(written).unwrap();
    for id in [&away, &moved] {
        restore(&here, id, Cause::NodeRestarted, None);
        assert_eq!(presence(&here, id)["cause"], "node_restarted");
    }
    is_written(&here);
    let _device = other.connect(&moved, &secret, &[V1]);
    is_written(&other);

    let devices = [parsed(&away), parsed(&moved)];
    here.block_on(settle(here.state(), &devices)).unwrap();

    let shown = presence(&here, &away);
    assert_eq!(
        (&shown["state"], &shown["evidence"]["kind"]),
        (&json!("offline"), &json!("not_back"))
    );
    for gateway in [&here, &other] {
        assert_eq!(presence(gateway, &moved)["state"], "online");
    }
    is_written(&here);
    assert_eq!(states(&history(&here, &away)), ["offline", "unknown", "online"]);
    assert_eq!(states(&history(&here, &moved)), ["online", "unknown", "online"]);
    assert_eq!(here.metric("seawall_presence_changes_total{state=\"offline\"}"), 1);
}

#[test]
fn device_that_moved_to_another_node_is_counted_there_alone_before_any_grace_ends() {
    let (here, other) = two_nodes();
    let devices: Vec<_> = (0..2).map(|_| here.register(json!({}))).collect();
    let mut connections = Vec::new();
    for (id, secret) in &devices {
        connections.push(here.connect(id, secret, &[V1, "Seawall-Firmware: 1.0"]));
    }
    is_written(&here);
    // One left, and one is waited for after a restart.
    connections.clear();
    here.eventually(|| here.state().sessions.is_empty());
    is_written(&here);
    let lost = parsed(&devices[1].0);
    here.state().history.forget(lost);
    is_written(&here);
    let restarted = PresenceWrite {
        device: lost,
        known: Known {
            epoch: SessionIds::new(here.state().boot.node, None).next(here.state().started - HOUR),
            presence: Presence::Online,
            since: here.state().started,
        },
        at: here.state().started,
        reason: Reason::CONNECTED,
        number: 4,
        tenant: "default",
        model: None,
        firmware: None,
    };
    here.block_on(here.state().store.presence_write(&[restarted], SessionId(u64::MAX)))
        .unwrap();
    restore(&here, &devices[1].0, Cause::NodeRestarted, None);
    assert_eq!(counts(&here, "tenant", "default"), json!([0, 1, 1]));

    for (id, secret) in &devices {
        connections.push(other.connect(id, secret, &[V1, "Seawall-Firmware: 2.0"]));
    }
    is_written(&other);

    here.eventually(|| counts(&here, "tenant", "default") == Value::Null);
    assert_eq!(counts(&other, "tenant", "default"), json!([2, 0, 0]));
    for (id, _) in &devices {
        assert_eq!(presence(&here, id)["state"], "online");
        let shown = here.get(&format!("/api/v1/devices/{id}")).json();
        assert_eq!(shown["firmware"], "2.0", "as the other node has seen it");
    }
}
