//! Evidence that a device is offline, and its absence; changes that a slow database gets late.

use std::{sync::Arc, time::Duration};

use seawall_gateway::{
    fleet::history::{Began, Offline},
    session::sessions::{Outgoing, OutgoingBody, PostError},
};
use seawall_proto::{
    close::{Close, EndReason},
    cohorts::Past,
    presence::{Evidence, Presence},
};
use sqlx::{Connection as _, Executor as _, PgConnection};
use tokio::sync::oneshot;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{
    devices::{device, id, plain},
    gateway::Gateway,
    pg,
    wait::eventually,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_end_of_a_session_has_its_evidence() {
    let gateway = Gateway::start("").await;
    gateway.register(0..4).await;
    let mut leaving = gateway.session(&device(0)).await;
    let reset = gateway.session(&device(1)).await;
    let mut ordered = gateway.session(&device(2)).await;
    let mut binary = gateway.session(&device(3)).await;

    leaving.close(1001, "").await.unwrap();
    reset.abort();
    let order = Close::disconnected(&mut rand::rng());
    gateway.shared.sessions.get(id(2)).unwrap().close(order);
    binary.send(Message::binary(b"x".to_vec())).await.unwrap();
    eventually(|| gateway.shared.sessions.is_empty()).await;

    let evidence = |number| {
        let record = gateway.shared.history.record(id(number)).unwrap();
        record.offline.map(|offline| offline.evidence)
    };
    let closed = |code, by_device| Some(Evidence::Closed { code, by_device });
    assert_eq!(evidence(0), closed(1001, true));
    assert_eq!(evidence(1), Some(Evidence::Reset));
    assert_eq!(evidence(2), closed(4003, false));
    assert_eq!(evidence(3), closed(1003, false));
    drop((ordered.next_frame().await, binary.next_frame().await));
}

/// Devices that change often, and devices whose changes find no room in the queue.
const CHANGING: u32 = 100;
const DROPPED: u32 = 20;
/// Changes of each of the former.
const CHANGES: usize = 6;

#[tokio::test(flavor = "multi_thread")]
async fn slow_database_gets_all_in_order_and_the_newest_state_of_what_found_no_room() {
    let url = pg::shared().database().await.unwrap();
    let gateway = Gateway::start_with_presence_queue(CHANGING as usize * CHANGES, &url).await;
    eventually(|| {
        gateway
            .shared
            .is_presence_restored
            .load(std::sync::atomic::Ordering::Relaxed)
    })
    .await;
    gateway.register(0..CHANGING + DROPPED).await;
    let mut connection = PgConnection::connect(url.expose()).await.unwrap();
    // 600 of them take longer than a call may.
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
                'BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END'; \
                CREATE TRIGGER slow BEFORE INSERT ON presence_history FOR EACH ROW EXECUTE FUNCTION slow()";
    connection.execute(sqlx::raw_sql(slow)).await.unwrap();
    let history = &gateway.shared.history;

    for round in 0..CHANGES / 2 {
        for number in 0..CHANGING {
            change(&gateway, number, round % 2 == 0);
        }
    }
    for number in CHANGING..CHANGING + DROPPED {
        change(&gateway, number, true);
    }
    let dropped = u64::from(2 * DROPPED);
    // A part of them may have been written by now.
    assert!(history.queue().dropped() <= dropped);
    let is_alarmed = || {
        let active = gateway.shared.alarms.active();
        active.iter().any(|(kind, ..)| *kind == "presence_queue")
    };
    eventually(is_alarmed).await;
    let len = history.queue().len();
    eventually(|| history.queue().len() < len).await;
    connection
        .execute(sqlx::raw_sql("DROP TRIGGER slow ON presence_history"))
        .await
        .unwrap();
    eventually(|| history.queue().is_empty() && !history.queue().is_behind()).await;
    eventually(|| !is_alarmed()).await;
    assert!(history.queue().dropped() > 0);

    for number in 0..CHANGING + DROPPED {
        let stored = gateway
            .shared
            .store
            .presence_history(id(number), None, 100)
            .await
            .unwrap();
        let newest = gateway.shared.store.presence_among(&[id(number)]).await.unwrap();
        let known = history.record(id(number)).unwrap().known;
        assert_eq!((newest[0].known, stored[0].known.presence), (known, known.presence));
        if number < CHANGING {
            let online = stored.iter().map(|row| row.known.presence == Presence::Online);
            assert!(online.eq([false, true].repeat(CHANGES / 2)), "{stored:?}");
        }
    }
    gateway.stop().await;
}

/// A session of a device begins and ends.
fn change(gateway: &Gateway, number: u32, is_reset: bool) {
    let shared = &gateway.shared;
    let at = shared.clock.wall();
    let session = shared.sessions.ids().next(at);
    let began = Began {
        session,
        group: &shared
            .history
            .groups()
            .of(&shared.cohorts.intern(None, Some("1.0.0")), &Arc::from("default"), None),
        since: at,
        at: shared.clock.now(),
    };
    shared.history.came_online(id(number), began, |known| known);
    let offline = Offline {
        since: at,
        at: shared.clock.now(),
        reason: EndReason::ClientGone,
        evidence: if is_reset {
            Evidence::Reset
        } else {
            Evidence::Closed {
                code: 1000,
                by_device: true,
            }
        },
        past: Past::default(),
    };
    shared.history.went_offline(id(number), session, offline).unwrap();
}

/// Posts large messages to a device that reads none, until its mailbox stays full or its session ends.
async fn fill(gateway: &Gateway, number: u32) {
    let session = gateway.shared.sessions.get(id(number)).unwrap();
    let mut full_for = 0;
    while full_for < 20 {
        let posted = session.post(Outgoing {
            id: "m".into(),
            body: OutgoingBody::Binary(vec![7; 45 * 1024].into()),
            done: oneshot::channel().0,
        });
        match posted {
            Ok(()) => full_for = 0,
            Err(PostError::MailboxFull) => {
                full_for += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(PostError::Offline) => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn device_that_does_not_read_was_ended_by_the_gateway() {
    let gateway = Gateway::start("[limits]\nwrite_timeout_ms = 3000\n").await;
    gateway.register(0..2).await;
    let slow = gateway.session(&plain(device(0))).await;
    let unheard = gateway.session(&plain(device(1))).await;

    fill(&gateway, 1).await;
    let order = Close::disconnected(&mut rand::rng());
    gateway.shared.sessions.get(id(1)).unwrap().close(order);
    fill(&gateway, 0).await;
    eventually(|| gateway.shared.sessions.is_empty()).await;

    let ended = |number| {
        let offline = gateway.shared.history.record(id(number)).unwrap().offline.unwrap();
        (offline.reason, offline.evidence)
    };
    let closed = |code| Evidence::Closed { code, by_device: false };
    assert_eq!(ended(0), (EndReason::SlowReader, closed(1008)));
    assert_eq!(ended(1), (EndReason::Disconnected, closed(4003)));
    drop((slow, unheard));
}
