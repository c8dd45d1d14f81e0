//! Firmware rules in a running gateway: for new connections, and with `evict` for live sessions.

use std::time::{Duration, Instant};

use seawall_gateway::store::{NewDevice, Store};
use seawall_proto::rules::{Effect, Match, RuleSpec};
use tokio::task::JoinSet;

use crate::harness::{
    devices::{
        Persisted, add_rule, assert_alive, attempt, audit, block, block_matching, device, devices, end_of, label,
        new_device, persist_all, with_wrong_secret,
    },
    gateway::Gateway,
    pg,
    wait::{PATIENCE, eventually, eventually_async},
};

/// A rule is enforced on new connections within this time, on every node.
const ENFORCED_WITHIN: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn blocked_firmware_never_reaches_a_look_up() {
    let gateway = Gateway::start("").await;
    gateway.register(0..50).await;
    let mut before = gateway.session(&device(0)).await;
    let rule = gateway
        .add_rule(RuleSpec {
            retry_after: Duration::from_secs(60),
            ..block(">=3.8.0-b3")
        })
        .await;
    let asked = asked(&gateway);

    let attempts = gateway
        .connect_all(
            &devices(1..50)
                .into_iter()
                .map(|device| device.firmware("3.8.0"))
                .collect::<Vec<_>>(),
        )
        .await;

    for attempt in &attempts {
        let refused = attempt.refused_with(403, "firmware_blocked");
        assert_eq!(refused.rule.as_deref(), Some(rule.0.to_string().as_str()));
        assert_eq!(refused.detail.as_deref(), Some("it crashes"));
        let hint = refused.retry_after_ms.unwrap();
        assert!((60_000..=120_000).contains(&hint), "{hint}");
        assert_eq!(refused.slot, None);
    }
    assert_eq!(self::asked(&gateway), asked);
    assert_alive(&mut before).await;
    gateway.session(&device(1).firmware("3.8.0-b2")).await;
    gateway.delete_rule(rule).await;
    gateway.session(&device(2).firmware("3.8.0")).await;
}

/// Lookups and statements so far.
fn asked(gateway: &Gateway) -> (u64, u64) {
    (
        gateway.metric("seawall_lookups_total{"),
        gateway.metric("seawall_lookup_statements_total "),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_of_another_node_is_enforced_within_a_second() {
    let database = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&database), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..1).await;
    let other_node = Store::open(&database).await.unwrap();
    other_node.ready().await;

    // A busy machine may delay one change, but not three.
    let mut took = Vec::new();
    for _ in 0..3 {
        let revision = gateway.shared.rules.current().revision();
        let written = Instant::now();
        let rule = add_rule(&other_node, block("1.*")).await;
        eventually(|| gateway.shared.rules.current().revision() > revision).await;
        let attempt = gateway.connect(&device(0)).await;
        attempt.refused_with(403, "firmware_blocked");
        let in_force = written.elapsed();
        let deleted = Instant::now();
        other_node.rule_delete(rule, &audit("rule.delete")).await.unwrap();
        eventually(|| gateway.shared.rules.current().revision() > revision + 1).await;
        gateway.connect(&device(0)).await.admitted();
        let out_of_force = deleted.elapsed();
        took.push(in_force.max(out_of_force));
    }

    took.sort();
    assert!(took[1] < ENFORCED_WITHIN, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn eviction_closes_matching_sessions_at_a_pace_and_no_others() {
    // The maximum is 200 per second, so slots are issued at 50 per second or more, and 5 per second are evicted.
    let gateway = Gateway::start("admission = { lookups_per_second_max = 200 }").await;
    gateway.register(0..20).await;
    let bad: Vec<_> = devices(0..12)
        .into_iter()
        .map(|device| device.firmware("2.0"))
        .collect();
    let bad_sessions = persist_all(gateway.devices, bad.clone()).await;
    let mut good_sessions = persist_all(gateway.devices, devices(12..20)).await;
    let rate_max = gateway.shared.lookups.k_ref() / 10.0;

    let rule = gateway
        .add_rule(RuleSpec {
            evict: true,
            retry_after: Duration::from_secs(100),
            ..block("2.*")
        })
        .await;
    let mut ends = JoinSet::new();
    for Persisted {
        connection: mut session,
        ..
    } in bad_sessions
    {
        ends.spawn(async move {
            let end = end_of(&mut session, PATIENCE).await;
            (Instant::now(), end)
        });
    }
    let mut ends = ends.join_all().await;

    ends.sort_by_key(|(at, _)| *at);
    for (_, (frames, code, reason)) in &ends {
        assert_eq!((frames.len(), *code), (0, 4000), "{reason}");
        assert_eq!(reason["reason"], "evicted");
        let hint = reason["retry_after_ms"].as_u64().unwrap();
        // The rule is old, but came into force a moment ago.
        assert!((30_000..=90_000).contains(&hint), "{hint}");
    }
    // The first is due at once, and up to a quarter of a second's share may go together.
    let at_once = 1.0 + (rate_max * 0.25).max(1.0);
    let took = (ends[11].0 - ends[0].0).as_secs_f64();
    assert!(
        took >= (12.0 - at_once) / rate_max,
        "12 in {took} s at {rate_max} per second"
    );
    assert_eq!(gateway.metric("seawall_closes_total{reason=\"evicted\"}"), 12);
    for session in &mut good_sessions {
        assert_alive(&mut session.connection).await;
    }
    gateway.connect(&bad[0]).await.refused_with(403, "firmware_blocked");
    gateway.delete_rule(rule).await;
    gateway.session(&bad[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn share_of_a_rule_is_let_through_always_the_same_and_raising_it_evicts_nobody() {
    let gateway = Gateway::start("").await;
    gateway.register(0..60).await;
    let bad: Vec<_> = devices(0..60)
        .into_iter()
        .map(|device| device.firmware("2.0"))
        .collect();
    let mut sessions: Vec<_> = persist_all(gateway.devices, bad.clone()).await;
    let spec = |admit_percent| RuleSpec {
        evict: true,
        admit_percent,
        ..block("2.*")
    };

    let id = gateway.add_rule(spec(40)).await;
    let rule = gateway.rule(id);
    let let_through = bad.iter().filter(|device| rule.admits(device.id)).count();
    assert!((10..40).contains(&let_through), "{let_through}");
    eventually(|| gateway.shared.sessions.len() == let_through).await;

    let mut admitted = 0;
    for (attempt, device) in gateway.connect_all(&bad).await.into_iter().zip(&bad) {
        if rule.admits(device.id) {
            sessions.push(Persisted {
                connection: attempt.admitted(),
                refusals: 0,
            });
            admitted += 1;
        } else {
            attempt.refused_with(403, "firmware_blocked");
        }
    }
    assert_eq!(admitted, let_through);

    gateway.change_rule(id, spec(80)).await;
    let raised = gateway.rule(id);
    let evicted = gateway.metric("seawall_closes_total{reason=\"evicted\"}");
    let attempts = gateway.connect_all(&bad).await;
    for (attempt, device) in attempts.iter().zip(&bad) {
        assert!(!rule.admits(device.id) || raised.admits(device.id));
        assert_eq!(attempt.outcome.is_ok(), raised.admits(device.id));
    }
    let in_the_share = bad.iter().filter(|device| raised.admits(device.id)).count();
    assert!(in_the_share > let_through);
    eventually(|| gateway.shared.sessions.len() == in_the_share).await;
    assert_eq!(gateway.metric("seawall_closes_total{reason=\"evicted\"}"), evicted);
}

#[tokio::test(flavor = "multi_thread")]
async fn throttled_devices_return_when_they_are_told_and_meet_the_rate() {
    let gateway = Gateway::start("").await;
    gateway.register(0..40).await;
    let fleet: Vec<_> = devices(0..40)
        .into_iter()
        .map(|device| device.firmware("2.0"))
        .collect();
    // Slots are remembered for devices that were authenticated.
    for device in &fleet {
        gateway.session(device).await.close(1000, "").await.unwrap();
    }
    let rule = gateway
        .add_rule(RuleSpec {
            rate_per_second: Some(5),
            ..RuleSpec::new(block("2.*").matches, Effect::Throttle)
        })
        .await;

    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for device in fleet.clone() {
        let address = gateway.devices;
        tasks.spawn(async move {
            let mut refusals = 0;
            loop {
                let attempt = attempt(address, device.clone()).await;
                if attempt.outcome.is_ok() {
                    return (begun.elapsed(), refusals, attempt.admitted());
                }
                let refused = attempt.refused_with(503, "throttled");
                assert_eq!(refused.rule.as_deref(), Some(rule.0.to_string().as_str()));
                refusals += 1;
                tokio::time::sleep(Duration::from_millis(refused.retry_after_ms.unwrap())).await;
            }
        });
    }
    let mut admitted = tasks.join_all().await;
    admitted.sort_by_key(|(at, ..)| *at);

    // A burst of 5, then 5 per second: the last one after 7 s, or slightly earlier.
    let last = admitted.last().unwrap().0.as_secs_f64();
    assert!((6.4..10.0).contains(&last), "{last}");
    for (number, (at, ..)) in admitted.iter().enumerate().skip(8) {
        assert!(at.as_secs_f64() > (number as f64 - 8.0) / 5.0, "{number}: {at:?}");
    }
    let refusals: u32 = admitted.iter().map(|(_, refusals, _)| *refusals).sum();
    assert!(refusals <= 40, "{refusals}: each is refused once");
    let throttled = gateway.metric("seawall_throttled_total{limit=\"rule\"}");
    assert_eq!(throttled, u64::from(refusals));
    gateway.session(&device(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_never_applies_to_the_devices_that_it_allows() {
    let gateway = Gateway::start("").await;
    gateway.register(0..3).await;
    let bad: Vec<_> = devices(0..3).into_iter().map(|device| device.firmware("2.0")).collect();
    let mut allowed = gateway.session(&bad[0]).await;
    let mut evicted = gateway.session(&bad[1]).await;
    gateway
        .add_rule(RuleSpec {
            evict: true,
            allow: [bad[0].id].into(),
            ..block("2.*")
        })
        .await;

    let (_, code, _) = end_of(&mut evicted, PATIENCE).await;
    assert_eq!(code, 4000);
    assert_alive(&mut allowed).await;
    gateway.session(&bad[0]).await;
    gateway.connect(&bad[1]).await.refused_with(403, "firmware_blocked");
    gateway.connect(&bad[2]).await.refused_with(403, "firmware_blocked");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_slips_in_while_a_rule_with_evict_is_made() {
    let gateway = Gateway::start("").await;
    gateway.register(0..300).await;
    let bad: Vec<_> = devices(0..300)
        .into_iter()
        .map(|device| device.firmware("2.0"))
        .collect();
    let half = || gateway.shared.sessions.len() >= 100;

    let (attempts, ()) = tokio::join!(gateway.connect_all(&bad), async {
        eventually(half).await;
        gateway
            .add_rule(RuleSpec {
                evict: true,
                ..block("2.*")
            })
            .await;
    });

    assert!(attempts.iter().any(|attempt| attempt.outcome.is_ok()));
    eventually(|| gateway.shared.sessions.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eviction_by_a_rule_of_another_node_reaches_live_sessions() {
    let database = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_on(Some(&database), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..2).await;
    let mut bad = gateway.session(&device(0).firmware("2.0")).await;
    let mut good = gateway.session(&device(1)).await;
    let other_node = Store::open(&database).await.unwrap();
    other_node.ready().await;

    add_rule(
        &other_node,
        RuleSpec {
            evict: true,
            ..block("2.*")
        },
    )
    .await;

    let (_, code, _) = end_of(&mut bad, PATIENCE).await;
    assert_eq!(code, 4000);
    assert_alive(&mut good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_by_what_the_registry_knows_refuses_after_the_look_up() {
    let gateway = Gateway::start("").await;
    let registered = [(0, None, Some("m1")), (1, Some("acme"), None), (2, None, None)];
    for (number, tenant, model) in registered {
        let device = NewDevice {
            external_id: None,
            tenant: tenant.map(label),
            model: model.map(label),
            ..new_device(number)
        };
        gateway.register_as(&device).await;
    }
    gateway
        .add_rule(block_matching(Match {
            model: Some(label("m1")),
            ..Match::default()
        }))
        .await;
    gateway
        .add_rule(block_matching(Match {
            tenant: Some(label("acme")),
            ..Match::default()
        }))
        .await;

    for number in [0, 1] {
        gateway
            .connect(&device(number))
            .await
            .refused_with(403, "firmware_blocked");
    }
    let mut liar = device(1);
    liar.tenant = Some("other".to_owned());
    gateway.connect(&liar).await.refused_with(403, "firmware_blocked");
    let wrong = with_wrong_secret(&device(0));
    gateway.connect(&wrong).await.refused_with(401, "unauthorized");

    gateway.session(&device(2)).await;
    assert_eq!(gateway.metric("seawall_lookups_total{outcome=\"found\"}"), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_ends_by_itself_when_it_expires() {
    let gateway = Gateway::start("").await;
    gateway.register(0..1).await;
    let expires_at = gateway.shared.clock.wall() + Duration::from_millis(600);
    gateway
        .add_rule(RuleSpec {
            expires_at: Some(expires_at),
            ..block("1.*")
        })
        .await;

    gateway.connect(&device(0)).await.refused_with(403, "firmware_blocked");
    eventually_async(async || gateway.connect(&device(0)).await.outcome.is_ok()).await;

    let late = gateway.shared.clock.wall().saturating_since(expires_at);
    assert!(
        gateway.shared.clock.wall() >= expires_at && late < ENFORCED_WITHIN,
        "{late:?}"
    );
}
