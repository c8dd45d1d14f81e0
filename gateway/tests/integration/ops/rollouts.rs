//! `/rules/{id}/release` and `/rules/{id}/rollout`, with real devices: staged changes that advance, halt and are
//! reverted.

use std::time::{Duration, Instant};

use firmware_sim::connection::{Connection, DeviceConfig};
use seawall_gateway::runtime::config::DatabaseUrl;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::rig::{Gateway, text};
use crate::harness::{
    devices::{attempt, devices, register},
    pg,
};

/// Minimum time of a stage in these tests.
const BAKE: Duration = Duration::from_secs(2);
/// Maximum time of a rollout of two stages.
const OVER_WITHIN: Duration = Duration::from_secs(60);

fn postgres() -> DatabaseUrl {
    Runtime::new().unwrap().block_on(pg::shared().database()).unwrap()
}

/// A gateway with a fleet of 40 devices with version 2 and 20 with version 1.
struct Fleet {
    gateway: Gateway,
    new: Vec<DeviceConfig>,
    old: Vec<DeviceConfig>,
    connected: Vec<(usize, Connection)>,
}

impl Fleet {
    fn start(database: Option<&DatabaseUrl>) -> Self {
        let gateway = Gateway::start_on(database, "");
        gateway.eventually(|| gateway.state().readiness().ready);
        gateway.block_on(register(&gateway.state().store, 0..60));
        let all = devices(0..60).into_iter().enumerate();
        let (new, old): (Vec<_>, Vec<_>) = all.partition(|(number, _)| *number < 40);
        Self {
            gateway,
            new: new.into_iter().map(|(_, device)| device.firmware("2.0")).collect(),
            old: old.into_iter().map(|(_, device)| device).collect(),
            connected: Vec::new(),
        }
    }

    fn block(&self, more: Value) -> (String, Value) {
        let mut rule = json!({"match": {"firmware": "2.*"}, "effect": "block", "retry_after": "1h", "confirm": true});
        rule.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.gateway.post("/api/v1/rules", rule);
        assert_eq!(answer.status, 201, "{answer:?}");
        (text(&answer.json()["id"]), answer.json())
    }

    fn rollout(&self, rule: &str) -> Value {
        let answer = self.gateway.get(&format!("/api/v1/rules/{rule}/rollout"));
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    /// Each device with version 2 that has no session attempts once. Admitted devices stay, or leave at once.
    fn connect_new(&mut self, stay: bool) {
        let address = self.gateway.device_address();
        for (number, device) in self.new.iter().enumerate() {
            if self.connected.iter().any(|(other, _)| *other == number) {
                continue;
            }
            let attempt = self.gateway.block_on(attempt(address, device.clone()));
            if let (Ok(connection), true) = (attempt.outcome, stay) {
                self.connected.push((number, connection));
            }
        }
    }

    /// Runs the fleet until the rollout has this state.
    #[track_caller]
    fn run_until(&mut self, rule: &str, state: &str, stay: bool) -> Value {
        let begun = Instant::now();
        let mut old = Vec::new();
        loop {
            let rollout = self.rollout(rule);
            if rollout["state"] == state {
                return rollout;
            }
            assert!(begun.elapsed() < OVER_WITHIN, "{rollout:#}");
            self.connect_new(stay);
            if let Some(device) = self.old.get(old.len()) {
                let address = self.gateway.device_address();
                let attempt = self.gateway.block_on(attempt(address, device.clone()));
                old.push(attempt.admitted());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn rule(&self, rule: &str) -> Value {
        self.gateway.get(&format!("/api/v1/rules/{rule}")).json()
    }
}

fn verdicts(rollout: &Value) -> Vec<(u64, String)> {
    let steps = rollout["steps"].as_array().unwrap().iter();
    steps
        .map(|step| (step["percent"].as_u64().unwrap(), text(&step["verdict"])))
        .collect()
}

fn expected(steps: &[(u64, &str)]) -> Vec<(u64, String)> {
    steps
        .iter()
        .map(|(percent, verdict)| (*percent, (*verdict).to_owned()))
        .collect()
}

fn good_release_is_done_by_itself(database: Option<&DatabaseUrl>) {
    let mut fleet = Fleet::start(database);
    let (rule, _) = fleet.block(json!({}));
    fleet.connect_new(true);
    assert_eq!(fleet.connected.len(), 0, "all are blocked");

    let begun = Instant::now();
    let plan = json!({"stages": [50, 100], "bake": "2s", "connects_min": 5});
    let answer = fleet.gateway.post(&format!("/api/v1/rules/{rule}/release"), plan);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(fleet.rule(&rule)["admit_percent"], 50, "in force when it is answered");
    fleet
        .gateway
        .eventually(|| fleet.gateway.state().rollouts.is_counting());
    let rollout = fleet.run_until(&rule, "done", true);

    assert!(begun.elapsed() >= 2 * BAKE, "{:?}", begun.elapsed());
    assert_eq!(
        verdicts(&rollout),
        expected(&[(50, "started"), (100, "fine"), (100, "fine")])
    );
    assert_eq!(
        (&rollout["direction"], &rollout["percent"]),
        (&json!("release"), &json!(100))
    );
    let treated = &rollout["evidence"]["treated"];
    assert!(
        treated["connects"].as_u64() >= Some(5) && treated["failed"] == 0,
        "{rollout:#}"
    );
    let ratio = &rollout["evidence"]["log_likelihood_ratio"];
    assert!(ratio.as_f64().unwrap() <= -3.0, "{rollout:#}");
    assert_eq!(*ratio, rollout["log_likelihood_ratio"]);
    assert_eq!(fleet.rule(&rule)["admit_percent"], 100);
    assert_eq!(fleet.gateway.metric("seawall_rollout_steps_total{verdict=\"fine\""), 2);
    let records = fleet.gateway.all("/api/v1/audit?", 100);
    let steps: Vec<_> = records
        .iter()
        .filter(|record| record["subject"] == rule.as_str())
        .map(|record| {
            (
                text(&record["action"]),
                text(&record["actor"]),
                record["after"]["admit_percent"].clone(),
            )
        })
        .collect();
    let step = |action: &str, actor: &str, percent: u64| (action.to_owned(), actor.to_owned(), json!(percent));
    assert_eq!(
        steps,
        [
            step("rollout.step", "gateway", 100),
            step("rollout.step", "gateway", 100),
            step("rollout.start", "admin.token", 50),
            step("rule.create", "admin.token", 0),
        ]
    );
    let told = format!("{:?}", fleet.gateway.state().events.after(0, 10_000, usize::MAX).events);
    assert!(told.contains("Rollout") && told.contains("\"done\""), "{told}");
}

#[test]
fn good_release_is_done_by_itself_on_sqlite() {
    good_release_is_done_by_itself(None);
}

#[test]
fn good_release_is_done_by_itself_on_postgresql() {
    good_release_is_done_by_itself(Some(&postgres()));
}

fn bad_release_is_halted(database: Option<&DatabaseUrl>) {
    let mut fleet = Fleet::start(database);
    let (rule, _) = fleet.block(json!({}));
    let path = format!("/api/v1/rules/{rule}/rollout");
    let plan = json!({"stages": [50, 100], "bake": "3s", "connects_min": 5});
    let answer = fleet.gateway.post(&format!("/api/v1/rules/{rule}/release"), plan);
    assert_eq!(answer.status, 201, "{answer:?}");

    // Every admitted device leaves at once, and returns.
    let halted = fleet.run_until(&rule, "halted", false);

    assert_eq!(verdicts(&halted), expected(&[(50, "started"), (0, "worse")]));
    assert_eq!((&halted["stage"], &halted["percent"]), (&json!(0), &json!(0)));
    assert!(halted["log_likelihood_ratio"].as_f64().unwrap() >= 9.16, "{halted:#}");
    assert_eq!(fleet.rule(&rule)["admit_percent"], 0);
    let alarm = || {
        let alarms = fleet.gateway.all("/api/v1/alarms?", 100);
        alarms.into_iter().find(|alarm| alarm["kind"] == "rollout_halted")
    };
    fleet.gateway.eventually(|| alarm().is_some());
    let raised = alarm().unwrap();
    assert_eq!(raised["subject"], rule.as_str());
    assert_eq!(raised["action"], format!("seawall rules rollout {rule}"), "{raised}");
    let address = fleet.gateway.device_address();
    for device in &fleet.new {
        let refused = fleet.gateway.block_on(attempt(address, device.clone()));
        refused.refused_with(403, "firmware_blocked");
    }
    // Only an operator can continue it.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(fleet.rollout(&rule)["state"], "halted");
    let resumed = fleet.gateway.patch(&path, json!({"state": "running"}));
    assert_eq!((resumed.status, &resumed.json()["percent"]), (200, &json!(50)));
    assert_eq!(
        resumed.json()["evidence"]["treated"],
        json!({"connects": 0, "failed": 0})
    );
    fleet.gateway.eventually(|| alarm().is_none());
    let reverted = fleet.gateway.patch(&path, json!({"state": "reverted"}));
    assert_eq!((reverted.status, &reverted.json()["percent"]), (200, &json!(0)));
    assert_eq!(fleet.rule(&rule)["admit_percent"], 0);
    let paused = fleet.gateway.patch(&path, json!({"state": "paused"}));
    assert_eq!(paused.problem(), (409, "conflict".into()));
}

#[test]
fn bad_release_is_halted_on_sqlite() {
    bad_release_is_halted(None);
}

#[test]
fn bad_release_is_halted_on_postgresql() {
    bad_release_is_halted(Some(&postgres()));
}

#[test]
fn new_rule_is_enforced_in_stages() {
    let mut fleet = Fleet::start(None);

    let plan = json!({"stages": [50, 100], "bake": "2s", "connects_min": 3});
    let (rule, made) = fleet.block(json!({"rollout": plan}));
    assert_eq!(made["admit_percent"], 50);
    fleet
        .gateway
        .eventually(|| fleet.gateway.state().rollouts.is_counting());
    // Each device attempts once, and some are admitted.
    fleet.connect_new(true);
    let let_in = fleet.connected.len();
    assert!((8..=32).contains(&let_in), "{let_in} of 40 at 50 %");
    let begun = Instant::now();
    while fleet.rollout(&rule)["state"] != "done" {
        assert!(begun.elapsed() < OVER_WITHIN, "{:#}", fleet.rollout(&rule));
        std::thread::sleep(Duration::from_millis(100));
    }

    let rollout = fleet.rollout(&rule);
    assert_eq!(verdicts(&rollout), expected(&[(50, "started"), (100, "fine")]));
    assert_eq!(
        rollout["evidence"]["treated"],
        json!({"connects": 40 - let_in, "failed": 0})
    );
    assert_eq!(fleet.rule(&rule)["admit_percent"], 0);
    let address = fleet.gateway.device_address();
    for device in &fleet.new {
        let refused = fleet.gateway.block_on(attempt(address, device.clone()));
        refused.refused_with(403, "firmware_blocked");
    }
}

#[test]
fn a_rule_that_is_changed_by_hand_pauses_its_rollout() {
    let fleet = Fleet::start(None);
    let (rule, _) = fleet.block(json!({}));
    let answer = fleet.gateway.post(&format!("/api/v1/rules/{rule}/release"), json!({}));
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.json()["stages"], json!([1, 5, 25, 50, 100]));
    assert_eq!(
        (&answer.json()["bake"], &answer.json()["connects_needed"]),
        (&json!("10m"), &json!(200))
    );

    let changed = fleet
        .gateway
        .patch(&format!("/api/v1/rules/{rule}"), json!({"admit_percent": 7}));
    assert_eq!(changed.status, 200, "{changed:?}");

    fleet.gateway.eventually(|| fleet.rollout(&rule)["state"] == "paused");
    let rollout = fleet.rollout(&rule);
    assert_eq!(verdicts(&rollout)[1].1, "rule_changed");
    let resumed = fleet
        .gateway
        .patch(&format!("/api/v1/rules/{rule}/rollout"), json!({"state": "running"}));
    assert_eq!(resumed.status, 200, "{resumed:?}");
    assert_eq!(fleet.rule(&rule)["admit_percent"], 1);
}

#[test]
fn what_makes_no_sense_is_refused_with_its_reason() {
    let gateway = Gateway::start();
    let rule = |more: Value| {
        let mut rule = json!({"match": {"firmware": "2.*"}, "effect": "block", "confirm": true});
        rule.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        gateway.post("/api/v1/rules", rule)
    };
    let id = text(&rule(json!({})).json()["id"]);
    let release = format!("/api/v1/rules/{id}/release");
    let rollout = format!("/api/v1/rules/{id}/rollout");

    for (plan, word) in [
        (json!({"stages": [5, 1]}), "stages"),
        (json!({"stages": []}), "stages"),
        (json!({"stages": [101]}), "stages"),
        (json!({"stages": "5"}), "sequence"),
        (json!({"bake": "0s"}), "bake"),
        (json!({"bake": "soon"}), "soon"),
        (json!({"connects_min": 0}), "connects_min"),
        (json!({"steps": [1]}), "steps"),
    ] {
        for answer in [
            gateway.post(&release, plan.clone()),
            rule(json!({"match": {"firmware": "3.*"}, "rollout": plan.clone()})),
        ] {
            assert_eq!(answer.problem().0, 422, "{plan}");
            assert!(answer.text.contains(word), "{plan}: {}", answer.text);
        }
    }
    let with_share = rule(json!({"match": {"firmware": "3.*"}, "admit_percent": 10, "rollout": {}}));
    assert_eq!(with_share.problem().0, 422);
    assert_eq!(gateway.all("/api/v1/rules?", 100).len(), 1, "no rule was made");
    let unknown = "/api/v1/rules/019c0000-0000-7000-8000-000000000000";
    assert_eq!(gateway.post(&format!("{unknown}/release"), json!({})).problem().0, 404);
    assert_eq!(gateway.get(&rollout).problem().0, 404);
    assert_eq!(gateway.patch(&rollout, json!({"state": "paused"})).problem().0, 404);
    assert_eq!(gateway.patch(&rollout, json!({"state": "done"})).problem().0, 422);
    assert_eq!(gateway.post(&release, json!({})).status, 201);
    assert_eq!(gateway.post(&release, json!({})).problem(), (409, "conflict".into()));
    assert_eq!(gateway.patch(&rollout, json!({"state": "running"})).problem().0, 409);
    assert_eq!(gateway.patch(&rollout, json!({"state": "paused"})).status, 200);
    assert_eq!(gateway.patch(&rollout, json!({"state": "reverted"})).status, 200);
    assert_eq!(
        gateway.post(&release, json!({"stages": [100]})).status,
        201,
        "once more"
    );
    assert_eq!(gateway.delete(&format!("/api/v1/rules/{id}")).status, 204);
    assert_eq!(gateway.get(&rollout).problem().0, 404);
    let harmless = text(&rule(json!({"mode": "dry_run"})).json()["id"]);
    let answer = gateway.post(&format!("/api/v1/rules/{harmless}/release"), json!({}));
    assert_eq!(answer.problem(), (409, "conflict".into()));
}
