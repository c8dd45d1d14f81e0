//! Presence in the database: the newest epoch wins, whichever node writes it, and old transitions go.

use seawall_gateway::store::{EvidenceText, PresenceState, PresenceWrite, Reason};
use seawall_proto::{
    epoch::{NodeTag, SessionIds},
    id::SessionId,
    presence::{Cause, Evidence, Known, Presence, known::Boot},
    time::WallTime,
};

use super::{Fixture, device, on_both, within};

const NOON: u64 = 1_796_000_000_000;
const RESET: Presence = Presence::Offline(Evidence::Reset);

on_both!(
    newest_epoch_stays_whatever_is_written_later,
    two_nodes_write_the_same_devices_at_once_and_the_newer_sessions_stay,
    history_is_complete_in_order_and_written_once,
    old_transitions_are_deleted_and_states_stay,
    what_is_forgotten_is_gone,
    nodes_tell_their_runs,
    thousand_transitions_are_one_call,
);

fn write(number: u128, epoch: u64, presence: Presence, order: u64, at: u64) -> PresenceWrite<'static> {
    let at = WallTime::from_unix_ms(at);
    PresenceWrite {
        device: device(number),
        known: Known {
            epoch: SessionId(epoch),
            presence,
            since: at,
        },
        at,
        reason: Reason::of("connected"),
        number: order,
        tenant: "acme",
        model: Some("m"),
        firmware: Some("3.8.0"),
    }
}

async fn stored(fixture: &Fixture, number: u128) -> Option<Known> {
    let found = fixture.store.presence_among(&[device(number)]).await.unwrap();
    found.first().map(|stored| stored.known)
}

async fn newest_epoch_stays_whatever_is_written_later(fixture: &Fixture) {
    let online = Presence::Online;
    let newest = write(1, u64::MAX - 5, online, 9, NOON);

    fixture.store.presence_write(&[newest]).await.unwrap();
    // A late close of an older session, from a node whose clock is ahead.
    fixture
        .store
        .presence_write(&[write(1, 7, RESET, 99, NOON + 9_000)])
        .await
        .unwrap();
    // A part of the same session that is written again.
    let earlier = write(1, u64::MAX - 5, Presence::Unknown(Cause::Path), 8, NOON);
    fixture.store.presence_write(&[earlier]).await.unwrap();
    assert_eq!(stored(fixture, 1).await, Some(newest.known));

    // The end of that session, although the clock was set back by an hour.
    let end = write(1, u64::MAX - 5, RESET, 10, NOON - 3_600_000);
    fixture.store.presence_write(&[end]).await.unwrap();
    assert_eq!(stored(fixture, 1).await, Some(end.known));

    // Within one call, the order of epochs counts as well.
    let (late, new) = (write(2, 3, RESET, 12, NOON), write(2, 4, online, 11, NOON));
    fixture.store.presence_write(&[new, late]).await.unwrap();
    assert_eq!(stored(fixture, 2).await, Some(new.known));
}

async fn two_nodes_write_the_same_devices_at_once_and_the_newer_sessions_stay(fixture: &Fixture) {
    let mut a = SessionIds::new(NodeTag(1), None);
    let mut b = SessionIds::new(NodeTag(2), None);
    let of_a: Vec<u64> = (0..300).map(|ms| a.next(WallTime::from_unix_ms(NOON + ms)).0).collect();
    let of_b: Vec<u64> = (0..300)
        .map(|ms| b.next(WallTime::from_unix_ms(NOON + 300 - ms)).0)
        .collect();
    let batch = |epochs: &[u64], presence| -> Vec<PresenceWrite<'static>> {
        (1..)
            .zip(epochs)
            .map(|(number, epoch)| write(number, *epoch, presence, 1, NOON))
            .collect()
    };
    let (mut from_a, from_b) = (batch(&of_a, Presence::Online), batch(&of_b, RESET));
    from_a.reverse();

    for _ in 0..5 {
        let both = async {
            let writes = (
                fixture.store.presence_write(&from_a),
                fixture.store.presence_write(&from_b),
            );
            let (a, b) = tokio::join!(writes.0, writes.1);
            a.and(b)
        };
        within(both).await.unwrap();
    }

    for (number, (a, b)) in (1..).zip(of_a.iter().zip(&of_b)) {
        let known = stored(fixture, number).await.unwrap();
        assert_eq!(known.epoch.0, *a.max(b));
        assert_eq!(known.presence, if a > b { Presence::Online } else { RESET });
    }
}

async fn history_is_complete_in_order_and_written_once(fixture: &Fixture) {
    let silent = Presence::Offline(Evidence::Silent {
        pings_unanswered: 3,
        last_heard: WallTime::from_unix_ms(NOON - 90_000),
    });
    let transitions = [
        write(1, 5, Presence::Online, 1, NOON),
        write(1, 5, Presence::Unknown(Cause::Path), 2, NOON + 10),
        write(1, 5, silent, 3, NOON + 20),
        write(1, 6, Presence::Online, 4, NOON - 3_600_000),
        write(2, 1, Presence::Online, 5, NOON),
    ];

    fixture.store.presence_write(&transitions[..3]).await.unwrap();
    fixture.store.presence_write(&transitions).await.unwrap();

    let history = fixture.store.presence_history(device(1), 100).await.unwrap();
    let presences: Vec<Presence> = history.iter().map(|row| row.known.presence).collect();
    let path = Presence::Unknown(Cause::NodeLost);
    assert_eq!(presences[0], Presence::Online);
    assert_eq!(presences[1], silent);
    // The reason is what names a cause, and this one was written with another.
    assert_eq!(presences[2..], [path, Presence::Online]);
    assert_eq!(history[0].known.since, WallTime::from_unix_ms(NOON - 3_600_000));
    assert_eq!(fixture.store.presence_history(device(1), 2).await.unwrap().len(), 2);
    assert_eq!(PresenceState::of(silent), PresenceState::Offline);
    assert!(matches!(
        EvidenceText::of(silent),
        Some(EvidenceText::Silent {
            pings_unanswered: 3,
            ..
        })
    ));
}

async fn old_transitions_are_deleted_and_states_stay(fixture: &Fixture) {
    let transitions: Vec<_> = (0..200)
        .map(|n| write(1, 5 + n, Presence::Online, n, NOON + n))
        .collect();
    fixture.store.presence_write(&transitions).await.unwrap();

    let deleted = fixture
        .store
        .presence_prune(WallTime::from_unix_ms(NOON + 150))
        .await
        .unwrap();

    assert_eq!(deleted, 150);
    assert_eq!(
        fixture
            .store
            .presence_prune(WallTime::from_unix_ms(NOON + 150))
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        fixture.store.presence_history(device(1), 1_000).await.unwrap().len(),
        50
    );
    fixture
        .store
        .presence_prune(WallTime::from_unix_ms(NOON + 500))
        .await
        .unwrap();
    assert_eq!(stored(fixture, 1).await, Some(transitions[199].known));
}

async fn what_is_forgotten_is_gone(fixture: &Fixture) {
    let both = [
        write(1, 5, Presence::Online, 1, NOON),
        write(2, 5, Presence::Online, 2, NOON),
    ];
    fixture.store.presence_write(&both).await.unwrap();

    fixture.store.presence_forget(&[device(1)]).await.unwrap();

    assert_eq!(stored(fixture, 1).await, None);
    assert!(fixture.store.presence_history(device(1), 9).await.unwrap().is_empty());
    let page = fixture.store.presence_page(None).await.unwrap();
    assert_eq!(page.items.iter().map(|row| row.device).collect::<Vec<_>>(), [device(2)]);
    assert_eq!(
        (page.items[0].tenant.as_str(), page.items[0].firmware.as_deref()),
        ("acme", Some("3.8.0"))
    );
}

async fn nodes_tell_their_runs(fixture: &Fixture) {
    let boot = |epoch| Boot {
        node: NodeTag(65_535),
        epoch: SessionId(epoch),
    };
    fixture
        .store
        .presence_node_write(boot(u64::MAX - 9), "a")
        .await
        .unwrap();
    fixture
        .store
        .presence_node_write(boot(u64::MAX - 8), "b")
        .await
        .unwrap();

    let nodes = fixture.store.presence_nodes().await.unwrap();

    assert_eq!(nodes.len(), 1);
    assert_eq!(
        (nodes[0].boot, nodes[0].node.as_str(), nodes[0].is_live),
        (boot(u64::MAX - 8), "b", true)
    );
}

async fn thousand_transitions_are_one_call(fixture: &Fixture) {
    let transitions: Vec<_> = (0..1_000).map(|n| write(n, 5, Presence::Online, 1, NOON)).collect();

    fixture.store.presence_write(&transitions).await.unwrap();

    let page = fixture.store.presence_page(None).await.unwrap();
    assert_eq!((page.items.len(), page.next_cursor), (1_000, None));
}
