//! Staged changes across restarts, and with two nodes on one database.

use std::time::{Duration, Instant};

use firmware_sim::connection::Connection;
use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{RolloutWrite, Store, StoredRollout},
};
use seawall_proto::{
    id::RuleId,
    rollout::{Direction, Plan, Rollout, SILENCE_MAX, State, Verdict},
};

use crate::harness::{
    devices::{attempt, audit, block, devices},
    gateway::Gateway,
    pg,
    wait::{eventually, eventually_async},
};

/// Maximum time of a rollout in which a node must take over.
const OVER_WITHIN: Duration = Duration::from_secs(90);

/// Blocks version 2, and begins its release.
async fn release(gateway: &Gateway, stages: &[u8], bake_s: u64, connects_min: u32) -> RuleId {
    let rule = gateway.add_rule(block("2.*")).await;
    let rules = gateway.shared.rules.current();
    let found = rules.rules().iter().find(|other| other.id == rule).unwrap();
    let plan = Plan {
        stages: stages.to_vec(),
        bake: Duration::from_secs(bake_s),
        connects_min,
    };
    let now = gateway.shared.store.now().await.unwrap();
    let write = RolloutWrite {
        rule,
        seen: None,
        rule_revision: found.revision,
        rollout: Rollout::begin(Direction::Release, plan, 0, 0, now).unwrap(),
    };
    let written = gateway.shared.store.rollout_step(write, &audit("rollout.start")).await;
    let revision = written.unwrap().unwrap().revision;
    eventually(|| gateway.shared.rules.current().revision() >= revision && gateway.shared.rollouts.is_counting()).await;
    rule
}

async fn stored(store: &Store, rule: RuleId) -> StoredRollout {
    store.rollout(rule).await.unwrap().unwrap()
}

fn verdicts(rollout: &Rollout) -> Vec<(u8, Verdict)> {
    rollout
        .steps()
        .iter()
        .map(|step| (step.percent, step.verdict))
        .collect()
}

/// Devices of version 2. Admitted ones stay.
#[derive(Default)]
struct Fleet(Vec<(usize, Connection)>);

impl Fleet {
    /// Each device without a session attempts once, on the gateways in turn.
    async fn connect(&mut self, gateways: &[&Gateway], numbers: std::ops::Range<u32>) {
        let first = numbers.start as usize;
        for (number, device) in (first..).zip(devices(numbers)) {
            if self.0.iter().any(|(other, _)| *other == number) {
                continue;
            }
            let address = gateways[number % gateways.len()].devices;
            if let Ok(connection) = attempt(address, device.firmware("2.0")).await.outcome {
                self.0.push((number, connection));
            }
        }
    }
}

async fn survives_a_restart(database: Option<&DatabaseUrl>) {
    let gateway = Gateway::start_on(database, "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..200).await;
    let rule = release(&gateway, &[50, 100], 4, 30).await;
    let mut fleet = Fleet::default();
    fleet.connect(&[&gateway], 0..40).await;
    eventually_async(async || stored(&gateway.shared.store, rule).await.totals.treated.connects > 0).await;
    let before = stored(&gateway.shared.store, rule).await.rollout;
    assert_eq!((before.state(), before.stage()), (State::Running, 1), "in mid-stage");

    let gateway = gateway.restart_on(database).await;
    eventually(|| gateway.shared.readiness().ready).await;
    let begun = Instant::now();
    let has_lost = |rollout: &Rollout| rollout.steps().iter().any(|step| step.verdict == Verdict::EvidenceLost);
    loop {
        let now = stored(&gateway.shared.store, rule).await.rollout;
        assert_eq!((now.state(), now.percent()), (State::Running, 50), "{now:?}");
        if has_lost(&now) {
            assert_eq!((now.window(), now.totals().treated.connects), (before.window() + 1, 0));
            break;
        }
        assert!(begun.elapsed() < OVER_WITHIN, "{now:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut fleet = Fleet::default();
    while stored(&gateway.shared.store, rule).await.rollout.state() != State::Done {
        fleet.connect(&[&gateway], 40..200).await;
        assert!(
            begun.elapsed() < OVER_WITHIN,
            "{:?}",
            stored(&gateway.shared.store, rule).await
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let done = stored(&gateway.shared.store, rule).await.rollout;
    assert_eq!(
        verdicts(&done),
        [
            (50, Verdict::Started),
            (50, Verdict::EvidenceLost),
            (100, Verdict::Fine),
            (100, Verdict::Fine),
        ]
    );
    drop(fleet);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_restart_in_mid_stage_on_sqlite() {
    survives_a_restart(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_a_restart_in_mid_stage_on_postgresql() {
    let database = pg::shared().database().await.unwrap();
    survives_a_restart(Some(&database)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_take_each_step_once_and_one_takes_over_from_the_other() {
    let database = pg::shared().database().await.unwrap();
    let (one, other) = (
        Gateway::start_on(Some(&database), "").await,
        Gateway::start_on(Some(&database), "").await,
    );
    eventually(|| one.shared.readiness().ready && other.shared.readiness().ready).await;
    one.register(0..60).await;
    let rule = release(&one, &[30, 60, 100], 2, 3).await;
    let mut fleet = Fleet::default();
    let begun = Instant::now();
    let store = Store::open(&database).await.unwrap();
    store.ready().await;
    while stored(&store, rule).await.rollout.stage() == 1 {
        assert!(begun.elapsed() < OVER_WITHIN);
        fleet.connect(&[&one, &other], 0..60).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let at_stage_two = stored(&store, rule).await.rollout;
    assert_eq!(verdicts(&at_stage_two), [(30, Verdict::Started), (60, Verdict::Fine)]);
    // Both nodes have counted devices.
    for gateway in [&one, &other] {
        eventually(|| {
            let rules = gateway.shared.rules.current();
            rules
                .rules()
                .iter()
                .any(|found| found.id == rule && found.spec.admit_percent == 60)
        })
        .await;
        assert!(!gateway.shared.sessions.is_empty());
    }

    // Whichever node drives: the remaining one continues, after the time in which it may wait for the other.
    one.end().await;
    // Devices of the other node keep their sessions.
    fleet.0.retain(|(number, _)| number % 2 == 1);
    let stopped = Instant::now();
    let has_lost = |rollout: &Rollout| rollout.steps().iter().any(|step| step.verdict == Verdict::EvidenceLost);
    while stopped.elapsed() < SILENCE_MAX + Duration::from_secs(5) && !has_lost(&stored(&store, rule).await.rollout) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    while stored(&store, rule).await.rollout.state() != State::Done {
        assert!(begun.elapsed() < OVER_WITHIN, "{:?}", stored(&store, rule).await);
        fleet.connect(&[&other], 0..60).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let done = stored(&store, rule).await.rollout;
    let fine: Vec<u8> = verdicts(&done)
        .into_iter()
        .filter(|(_, verdict)| *verdict == Verdict::Fine)
        .map(|(percent, _)| percent)
        .collect();
    assert_eq!(fine, [60, 100, 100], "{:?}", verdicts(&done));
    let records = store.audit_page(None, 100).await.unwrap().items;
    let steps = records.iter().filter(|record| record.action == "rollout.step").count();
    assert_eq!(steps, done.steps().len() - 1, "each step has one record");
    drop(fleet);
    other.stop().await;
}
