//! Sessions that must move: a drain that is announced first, and the maximum age.

use std::time::{Duration, Instant};

use seawall_proto::departures::{DrainOrder, DrainState};
use serde_json::json;

use crate::harness::{
    devices::{assert_alive, device, devices, end_of, persist},
    gateway::Gateway,
    wait::{PATIENCE, eventually},
};

/// Time of the announcement, long enough for the checks.
const ANNOUNCED_FOR: Duration = Duration::from_millis(1_500);

#[tokio::test(flavor = "multi_thread")]
async fn announced_drain_is_not_ready_first_and_closes_nobody_meanwhile() {
    let gateway = Gateway::start("").await;
    gateway.register(0..3).await;
    let mut early = gateway.session(&device(0)).await;

    let begun = Instant::now();
    gateway.shared.departures.start_drain(order(ANNOUNCED_FOR)).unwrap();

    assert_eq!(gateway.readyz().await, 503);
    assert_eq!(gateway.shared.departures.drain_status().state, DrainState::Announced);
    let mut late = gateway.session(&device(1)).await;
    assert_alive(&mut early).await;
    for session in [&mut early, &mut late] {
        let (_, code, reason) = end_of(session, PATIENCE).await;
        assert_eq!((code, &reason["reason"]), (1012, &json!("draining")));
        assert!(reason["slot"].is_string(), "{reason}");
        assert!(begun.elapsed() >= ANNOUNCED_FOR, "{:?}", begun.elapsed());
    }
    gateway.connect(&device(2)).await.refused_with(503, "draining");
    eventually(|| gateway.shared.departures.drain_status().state == DrainState::Drained).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_cancelled_while_it_is_announced_closes_nobody() {
    let gateway = Gateway::start("").await;
    gateway.register(0..2).await;
    let mut session = gateway.session(&device(0)).await;
    gateway
        .shared
        .departures
        .start_drain(order(Duration::from_secs(60)))
        .unwrap();
    assert_eq!(gateway.readyz().await, 503);

    assert!(gateway.shared.departures.cancel_drain());

    assert_eq!(gateway.readyz().await, 200);
    assert_alive(&mut session).await;
    gateway.session(&device(1)).await;
    // The next order is carried out nevertheless.
    gateway.shared.departures.start_drain(order(Duration::ZERO)).unwrap();
    assert_eq!(end_of(&mut session, PATIENCE).await.1, 1012);
}

/// On one thread, so that nothing runs between the cancellation and the next order.
#[tokio::test]
async fn drain_ordered_right_after_another_was_cancelled_is_carried_out() {
    let gateway = Gateway::start("").await;
    let newest = gateway.shared.events.subscribe();
    let before = *newest.borrow();
    gateway
        .shared
        .departures
        .start_drain(order(Duration::from_secs(60)))
        .unwrap();
    eventually(|| *newest.borrow() > before).await;

    assert!(gateway.shared.departures.cancel_drain());
    gateway.shared.departures.start_drain(order(Duration::ZERO)).unwrap();

    eventually(|| gateway.shared.departures.drain_status().state == DrainState::Drained).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expedited_drain_waits_for_no_balancer_and_skips_no_hint() {
    let gateway = Gateway::start("").await;
    gateway.register(0..20).await;
    let sessions = gateway.sessions(&devices(0..20)).await;
    gateway
        .shared
        .departures
        .start_drain(order(Duration::from_secs(60)))
        .unwrap();

    gateway.shared.departures.expedite_drain();

    let begun = Instant::now();
    for mut session in sessions {
        let (_, code, reason) = end_of(&mut session, PATIENCE).await;
        assert_eq!(code, 1012);
        assert!(
            reason["slot"].is_string() && reason["retry_after_ms"].is_u64(),
            "{reason}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn old_sessions_move_on_few_at_a_time_with_a_slot() {
    let gateway = Gateway::start("[session]\nage_max_seconds = 1\n").await;
    gateway.register(0..10).await;
    let mut sessions = gateway.sessions(&devices(0..10)).await;
    eventually(|| gateway.metric("seawall_closes_total{reason=\"ageing\"}") == 1).await;

    let mut moved = Vec::new();
    for (number, session) in (0..).zip(&mut sessions) {
        if gateway.shared.sessions.get(device(number).id).is_none() {
            let (frames, code, reason) = end_of(session, PATIENCE).await;
            assert_eq!((code, &reason["reason"]), (1012, &json!("ageing")));
            let types: Vec<&str> = frames.iter().map(|frame| frame["type"].as_str().unwrap()).collect();
            assert_eq!(types, ["resume", "reconnect"], "a new token, then the hint");
            assert_eq!(frames[1]["reason"], "ageing");
            let wait = reason["retry_after_ms"].as_u64().unwrap();
            assert!((1_000..10_000).contains(&wait), "{wait}");
            moved.push((number, reason["slot"].as_str().unwrap().to_owned()));
        } else {
            assert_alive(session).await;
        }
    }

    assert_eq!(moved.len(), 1, "one in a hundred sessions may end per minute");
    let mut back = device(moved[0].0);
    back.slot = Some(moved[0].1.clone());
    let _back = persist(gateway.devices, back).await;
    assert_eq!(gateway.shared.sessions.len(), 10);
}

fn order(announce: Duration) -> DrainOrder {
    DrainOrder {
        rate_per_second: None,
        announce,
        deadline: Duration::from_secs(120),
    }
}
