//! A crash-looping version in a fleet of real devices, with nobody at the keyboard: named, and gated where that is
//! allowed.

use std::time::{Duration, Instant};

use seawall_gateway::runtime::config::DatabaseUrl;
use seawall_proto::cohorts::SHORT_SESSION;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::rig::Gateway;
use crate::harness::{
    devices::{attempt, device, persist_all, register},
    pg,
};

const BAD_VERSION: &str = "3.8.0-b3";
/// The devices that crash are under a fifth of the fleet.
const FLEET: Fleet = Fleet {
    first: 0,
    good: 270,
    bad: 60,
    bad_version: BAD_VERSION,
};
const CRASH_AFTER: Duration = Duration::from_secs(2);
/// A bad version is named within this time.
const NAMED_WITHIN: Duration = Duration::from_secs(60);

/// Devices of one node.
#[derive(Clone, Copy)]
struct Fleet {
    /// Number of the first device.
    first: u32,
    /// Devices with good versions, which stay connected.
    good: u32,
    /// Devices that crash two seconds after each connect.
    bad: u32,
    bad_version: &'static str,
}

struct Incident {
    gateway: Gateway,
    begun: Instant,
    /// Sessions of good devices.
    steady: Vec<firmware_sim::connection::Connection>,
    /// Devices in their crash loop, until it is dropped.
    loops: JoinSet<()>,
}

impl Incident {
    /// `mode`: of the breaker.
    fn begin(mode: &str) -> Self {
        let database = pg::shared();
        let database = tokio::runtime::Runtime::new().unwrap().block_on(database.database());
        Self::begin_on(&database.unwrap(), mode, FLEET)
    }

    fn begin_on(database: &DatabaseUrl, mode: &str, fleet: Fleet) -> Self {
        let Fleet {
            first,
            good,
            bad,
            bad_version,
        } = fleet;
        let (first_bad, end) = (first + good, first + good + bad);
        let settings = format!("breaker = {{ mode = \"{mode}\" }}");
        let gateway = Gateway::start_on(Some(database), &settings);
        gateway.block_on(register(&gateway.state().store, first..end));
        let address = gateway.device_address();
        let good = (first..first_bad).map(|number| {
            let version = if number % 3 == 0 { "3.7.2" } else { "3.8.0-b2" };
            device(number).firmware(version)
        });
        let steady = gateway.block_on(persist_all(address, good.collect::<Vec<_>>()));
        let mut loops = JoinSet::new();
        gateway.block_on(async {
            for number in first_bad..end {
                let device = device(number).firmware(bad_version);
                loops.spawn(async move {
                    loop {
                        let crash_after = CRASH_AFTER + Duration::from_millis(u64::from(number % 10) * 50);
                        let attempt = attempt(address, device.clone()).await;
                        tokio::time::sleep(crash_after).await;
                        drop(attempt);
                    }
                });
            }
        });
        Self {
            gateway,
            begun: Instant::now(),
            steady: steady.into_iter().map(|persisted| persisted.connection).collect(),
            loops,
        }
    }

    /// Waits until a proposal is as `holds` says, for a minute at most.
    fn proposal(&self, holds: impl Fn(&Value) -> bool) -> Value {
        loop {
            let proposals = self.gateway.all("/api/v1/proposals?", 10);
            if let Some(proposal) = proposals.iter().find(|proposal| holds(proposal)) {
                println!("{} after {:?}", proposal["state"], self.begun.elapsed());
                return proposal.clone();
            }
            assert!(self.begun.elapsed() < NAMED_WITHIN, "{proposals:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn end(mut self) {
        self.gateway.block_on(self.loops.shutdown());
        drop(self.steady);
    }
}

#[test]
fn a_crash_looping_version_is_named_within_a_minute_and_a_person_gates_it() {
    let incident = Incident::begin("propose");
    let gateway = &incident.gateway;

    let proposal = incident.proposal(|proposal| proposal["state"] == "open");

    assert!(CRASH_AFTER < SHORT_SESSION);
    let id = proposal["id"].as_str().unwrap();
    assert_eq!(proposal["cohort"], format!("(none)/{BAD_VERSION}"), "{proposal}");
    assert_eq!(proposal["signal"], "repeats");
    assert_eq!(proposal["rule"]["match"]["firmware"], format!("={BAD_VERSION}"));
    assert_eq!(proposal["rule"]["admit_percent"], 10);
    assert!(proposal["evidence"]["observed"].as_f64() > proposal["evidence"]["expected"].as_f64());
    assert!(proposal["preview"]["connected"].as_u64() > Some(0), "{proposal}");
    let alarms = gateway.get("/api/v1/alarms").json();
    let alarm = &alarms["items"][0];
    assert_eq!(alarm["kind"], "bad_cohort", "{alarms}");
    assert_eq!(alarm["action"], format!("seawall proposals apply {id}"), "{alarms}");
    let viewer = gateway.token("viewer");
    let apply = format!("/api/v1/proposals/{id}/apply");
    let forbidden = gateway.call_as(&viewer, "POST", &apply, None);
    assert_eq!(forbidden.status, 403, "{forbidden:?}");
    assert_eq!(gateway.call_as(&viewer, "GET", "/api/v1/proposals", None).status, 200);
    std::thread::sleep(Duration::from_secs(20));
    let unasked = gateway.get("/api/v1/rules").json();
    assert_eq!(unasked["items"], json!([]), "nothing is applied in this mode");

    let rule = gateway.call_as(&gateway.token("operator"), "POST", &apply, None);

    assert_eq!(rule.status, 201, "{rule:?}");
    assert_eq!(rule.json()["admit_percent"], 10);
    assert!(rule.json()["expires_at"].is_string());
    assert_eq!(gateway.post(&apply, json!({})).problem(), (409, "conflict".to_owned()));
    let dismissed = gateway.post(&format!("/api/v1/proposals/{id}/dismiss"), json!({}));
    assert_eq!(dismissed.problem(), (409, "conflict".to_owned()));
    let first = &gateway.get("/api/v1/firmware").json()["items"][0];
    assert_eq!(
        (&first["firmware"], &first["breaker"]),
        (&json!(BAD_VERSION), &json!("open"))
    );
    assert!(first["minute"]["repeats"].as_f64() > Some(1.0), "{first}");
    gateway.eventually(|| gateway.metric("seawall_handshakes_total{outcome=\"firmware_blocked\"}") > 20);
    let audit = gateway.get("/api/v1/audit").json();
    let actions: Vec<_> = audit["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| &record["action"])
        .collect();
    assert!(actions.contains(&&json!("proposal.apply")), "{actions:?}");
    assert_eq!(gateway.all("/api/v1/proposals?", 10).len(), 1, "nobody else is accused");
    let rule = rule.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(gateway.delete(&format!("/api/v1/rules/{rule}")).status, 204);
    gateway.eventually(|| gateway.all("/api/v1/proposals?", 10)[0]["state"] == "dismissed");
    // What the crash loops did to presence is an alarm for a minute more.
    gateway.eventually(|| {
        let alarms = gateway.get("/api/v1/alarms").json();
        alarms["items"]
            .as_array()
            .unwrap()
            .iter()
            .all(|alarm| alarm["kind"] != "bad_cohort")
    });
    incident.end();
}

/// The database freezes while a person applies the rule.
#[test]
fn a_person_gates_a_version_while_the_database_is_away() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let cluster = pg::Cluster::start().unwrap();
    let database = outside.block_on(cluster.database()).unwrap();
    let incident = Incident::begin_on(&database, "propose", FLEET);
    let gateway = &incident.gateway;
    let proposal = incident.proposal(|proposal| proposal["state"] == "open");
    let id = proposal["id"].as_str().unwrap();
    cluster.freeze().unwrap();

    let rule = gateway.post(&format!("/api/v1/proposals/{id}/apply"), json!({"confirm": true}));

    assert_eq!(rule.status, 202, "{rule:?}");
    assert_eq!(rule.json()["state"], "local");
    assert_eq!(gateway.all("/api/v1/proposals?", 10)[0]["state"], "applied");
    cluster.thaw().unwrap();
    gateway.eventually(|| gateway.state().rules.local().writes.is_empty());
    let rules = gateway.all("/api/v1/rules?", 10);
    assert_eq!(rules.len(), 1, "{rules:?}");
    assert_eq!(rules[0]["id"], rule.json()["id"]);
    assert_eq!(gateway.all("/api/v1/proposals?", 10)[0]["state"], "applied");
    incident.end();
}

#[test]
fn a_crash_looping_version_is_gated_without_a_person_where_that_is_allowed() {
    let incident = Incident::begin("apply");
    let gateway = &incident.gateway;

    let proposal = incident.proposal(|proposal| proposal["state"] == "applied");

    assert_eq!(proposal["cohort"], format!("(none)/{BAD_VERSION}"), "{proposal}");
    let rules = gateway.get("/api/v1/rules").json();
    let rule = &rules["items"][0];
    assert_eq!(rule["match"]["firmware"], format!("={BAD_VERSION}"));
    assert_eq!((&rule["effect"], &rule["admit_percent"]), (&json!("block"), &json!(10)));
    assert_eq!(rule["id"], proposal["rule"]["id"]);
    gateway.eventually(|| gateway.metric("seawall_handshakes_total{outcome=\"firmware_blocked\"}") > 20);
    let audit = gateway.get("/api/v1/audit").json();
    let records = audit["items"].as_array().unwrap();
    let record = records
        .iter()
        .find(|record| record["action"] == "proposal.apply")
        .unwrap();
    assert_eq!(record["actor"], "gateway");
    assert_eq!(gateway.metric("seawall_proposals{state=\"applied\"}"), 1);
    assert_eq!(gateway.all("/api/v1/proposals?", 10).len(), 1, "nobody else is accused");
    assert!(
        gateway.state().sessions.len() >= FLEET.good as usize,
        "good devices stay"
    );
    incident.end();
}

/// A version begins to crash on each of two nodes at the same time.
#[test]
fn two_nodes_make_one_rule_in_ten_minutes() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let database = outside.block_on(pg::shared().database()).unwrap();
    let other = Fleet {
        first: 1_000,
        bad_version: "4.0.0-rc1",
        ..FLEET
    };
    let incidents = [FLEET, other].map(|fleet| Incident::begin_on(&database, "apply", fleet));
    let applied = |incident: &Incident| {
        let proposals = incident.gateway.all("/api/v1/proposals?", 10);
        proposals.iter().any(|proposal| proposal["state"] == "applied")
    };
    for incident in &incidents {
        incident.proposal(|proposal| ["open", "applied"].contains(&proposal["state"].as_str().unwrap()));
    }
    incidents[0].gateway.eventually(|| incidents.iter().any(applied));

    // Both keep crashing, and the other node would make its rule any second.
    std::thread::sleep(Duration::from_secs(25));

    for incident in &incidents {
        let rules = incident.gateway.all("/api/v1/rules?", 10);
        assert_eq!(rules.len(), 1, "{rules:?}");
    }
    assert_eq!(incidents.iter().filter(|incident| applied(incident)).count(), 1);
    let audit = incidents[0].gateway.get("/api/v1/audit").json();
    let is_apply = |record: &&Value| record["action"] == "proposal.apply";
    assert_eq!(audit["items"].as_array().unwrap().iter().filter(is_apply).count(), 1);
    for incident in incidents {
        incident.end();
    }
}

/// The bad version is under a fifth of the devices of one node, and over a fifth of those of both.
#[test]
fn a_version_that_is_over_a_fifth_of_all_nodes_devices_is_left_to_a_person() {
    let outside = tokio::runtime::Runtime::new().unwrap();
    let database = outside.block_on(pg::shared().database()).unwrap();
    let other = Fleet {
        first: 1_000,
        good: 10,
        bad: 120,
        ..FLEET
    };
    // With no rest to compare with, this node itself accuses nobody.
    let second = Incident::begin_on(&database, "apply", other);
    let first = Incident::begin_on(&database, "apply", FLEET);
    first.proposal(|proposal| proposal["state"] == "open");

    std::thread::sleep(Duration::from_secs(25));

    let proposals = first.gateway.all("/api/v1/proposals?", 10);
    assert_eq!((proposals.len(), &proposals[0]["state"]), (1, &json!("open")));
    assert_eq!(proposals[0]["cohort"], format!("(none)/{BAD_VERSION}"));
    assert_eq!(first.gateway.get("/api/v1/rules").json()["items"], json!([]));
    first.end();
    second.end();
}

#[test]
fn what_is_no_proposal_can_not_be_decided_on() {
    let gateway = Gateway::start_with("breaker = { mode = \"off\" }");

    let unknown = gateway.post(
        "/api/v1/proposals/0198f3a0-0000-7000-8000-000000000000/apply",
        json!({}),
    );
    let malformed = gateway.post("/api/v1/proposals/nobody/dismiss", json!({}));

    assert_eq!(unknown.problem(), (404, "not_found".to_owned()));
    assert_eq!(malformed.problem(), (400, "bad_request".to_owned()));
    assert_eq!(gateway.get("/api/v1/proposals").json()["items"], json!([]));
}
