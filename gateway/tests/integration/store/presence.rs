//! Presence in the database: the newest epoch wins, whichever node writes it, and old transitions go.

use seawall_gateway::store::{EvidenceText, PresenceState, PresenceWrite, Reason, StoredPresence};
use seawall_proto::{
    epoch::{NodeTag, SessionIds},
    id::SessionId,
    presence::{Cause, Evidence, Known, Presence, known::Boot},
    time::WallTime,
};

use super::{Fixture, audit, device, on_both, within};

const NOON: u64 = 1_796_000_000_000;
const RESET: Presence = Presence::Offline(Evidence::Reset);

on_both!(
    newest_epoch_stays_whatever_is_written_later,
    two_nodes_write_the_same_devices_at_once_and_the_newer_sessions_stay,
    history_is_complete_in_order_and_written_once,
    old_transitions_are_deleted_and_states_stay,
    what_is_forgotten_is_gone,
    late_write_of_another_node_does_not_bring_a_deleted_device_back,
    state_of_a_clock_that_was_years_ahead_yields_to_any,
    writer_is_told_which_of_its_states_are_older,
    old_transitions_of_one_millisecond_are_deleted_in_bounded_pieces,
    history_of_a_device_is_cut,
    row_that_cannot_be_read_is_left_out,
    node_that_was_found_gone_is_told,
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

/// Writes for registered devices: the numbers up to 1,000.
async fn put(fixture: &Fixture, transitions: &[PresenceWrite<'_>]) -> Vec<StoredPresence> {
    write_believing(fixture, transitions, SessionId(u64::MAX)).await
}

async fn write_believing(
    fixture: &Fixture,
    transitions: &[PresenceWrite<'_>],
    believed: SessionId,
) -> Vec<StoredPresence> {
    fixture.store.presence_write(transitions, believed).await.unwrap()
}

async fn stored(fixture: &Fixture, number: u128) -> Option<Known> {
    let found = fixture.store.presence_among(&[device(number)]).await.unwrap();
    found.first().map(|stored| stored.known)
}

async fn newest_epoch_stays_whatever_is_written_later(fixture: &Fixture) {
    let online = Presence::Online;
    let newest = write(1, u64::MAX - 5, online, 9, NOON);

    fixture.db_fill(10).await;
    put(fixture, &[newest]).await;
    // A late close of an older session, from a node whose clock is ahead.
    put(fixture, &[write(1, 7, RESET, 99, NOON + 9_000)]).await;
    // A part of the same session that is written again.
    let earlier = write(1, u64::MAX - 5, Presence::Unknown(Cause::Path), 8, NOON);
    put(fixture, &[earlier]).await;
    assert_eq!(stored(fixture, 1).await, Some(newest.known));

    // The end of that session, although the clock was set back by an hour.
    let end = write(1, u64::MAX - 5, RESET, 10, NOON - 3_600_000);
    put(fixture, &[end]).await;
    assert_eq!(stored(fixture, 1).await, Some(end.known));

    // Within one call, the order of epochs counts as well.
    let (late, new) = (write(2, 3, RESET, 12, NOON), write(2, 4, online, 11, NOON));
    put(fixture, &[new, late]).await;
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
    fixture.db_fill(300).await;

    for _ in 0..5 {
        let both = async {
            tokio::join!(put(fixture, &from_a), put(fixture, &from_b));
        };
        within(both).await;
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

    fixture.db_fill(10).await;
    put(fixture, &transitions[..3]).await;
    put(fixture, &transitions).await;

    let history = fixture.store.presence_history(device(1), None, 100).await.unwrap();
    let presences: Vec<Presence> = history.iter().map(|row| row.known.presence).collect();
    let path = Presence::Unknown(Cause::NodeLost);
    assert_eq!(presences[0], Presence::Online);
    assert_eq!(presences[1], silent);
    // The reason is what names a cause, and this one was written with another.
    assert_eq!(presences[2..], [path, Presence::Online]);
    assert_eq!(history[0].known.since, WallTime::from_unix_ms(NOON - 3_600_000));
    assert_eq!(
        fixture.store.presence_history(device(1), None, 2).await.unwrap().len(),
        2
    );
    for (index, row) in history.iter().enumerate() {
        let from = Some((row.known.epoch, row.number));
        let rest = fixture.store.presence_history(device(1), from, 100).await.unwrap();
        assert_eq!(rest, history[index..]);
    }
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
    fixture.db_fill(10).await;
    put(fixture, &transitions).await;
    let prune = |before| {
        fixture
            .store
            .presence_prune(WallTime::from_unix_ms(NOON + before), 5_000)
    };

    assert_eq!(prune(150).await.unwrap(), 150);
    assert_eq!(prune(150).await.unwrap(), 0);
    let left = fixture.store.presence_history(device(1), None, 1_000).await.unwrap();
    assert_eq!(left.len(), 50);
    prune(500).await.unwrap();
    assert_eq!(stored(fixture, 1).await, Some(transitions[199].known));
}

async fn old_transitions_of_one_millisecond_are_deleted_in_bounded_pieces(fixture: &Fixture) {
    fixture.db_fill(1_000).await;
    let transitions: Vec<_> = (1..=1_000).map(|n| write(n, 5, RESET, 1, NOON)).collect();
    put(fixture, &transitions).await;
    let prune = |limit| fixture.store.presence_prune(WallTime::from_unix_ms(NOON + 1), limit);

    for limit in [1, 99, 400] {
        assert_eq!(prune(limit).await.unwrap(), u64::from(limit));
    }
    assert_eq!(prune(u32::MAX).await.unwrap(), 500);
}

async fn history_of_a_device_is_cut(fixture: &Fixture) {
    fixture.db_fill(10).await;
    for batch in 0..3 {
        let transitions: Vec<_> = (0..500)
            .map(|n| write(1, 1 + batch, Presence::Online, n, NOON))
            .collect();
        put(fixture, &transitions).await;
    }
    put(fixture, &[write(2, 1, RESET, 1, NOON)]).await;

    let deleted = fixture.store.presence_trim(&[device(1), device(2)]).await.unwrap();

    assert_eq!(deleted, 500);
    let left = fixture.store.presence_history(device(1), None, 1_000).await.unwrap();
    assert_eq!(
        (left.len(), left[999].known.epoch),
        (1_000, SessionId(2)),
        "the newest stay"
    );
    assert_eq!(
        fixture.store.presence_history(device(2), None, 9).await.unwrap().len(),
        1
    );
    assert_eq!(fixture.store.presence_trim(&[device(1)]).await.unwrap(), 0);
}

async fn late_write_of_another_node_does_not_bring_a_deleted_device_back(fixture: &Fixture) {
    fixture.db_fill(2).await;
    put(fixture, &[write(1, 5, Presence::Online, 1, NOON)]).await;

    fixture
        .store
        .device_delete(device(1), &audit("device.delete", 1))
        .await
        .unwrap();
    fixture.store.presence_forget(&[device(1)]).await.unwrap();
    let late = [write(1, 5, RESET, 2, NOON), write(2, 5, RESET, 3, NOON)];
    let outdone = put(fixture, &late).await;

    assert_eq!((outdone, stored(fixture, 1).await), (Vec::new(), None));
    assert!(
        fixture
            .store
            .presence_history(device(1), None, 9)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(stored(fixture, 2).await, Some(late[1].known), "others are written");
}

async fn state_of_a_clock_that_was_years_ahead_yields_to_any(fixture: &Fixture) {
    fixture.db_fill(2).await;
    let (ahead, believed) = (write(1, u64::MAX - 5, RESET, 9, NOON), SessionId(1_000));
    put(fixture, &[ahead]).await;

    let now = write(1, 7, Presence::Online, 1, NOON);
    assert!(write_believing(fixture, &[now], believed).await.is_empty());
    assert_eq!(stored(fixture, 1).await, Some(now.known));

    // An epoch that is ahead, and believed, stays.
    write_believing(fixture, &[write(1, 999, RESET, 1, NOON)], believed).await;
    write_believing(fixture, &[write(1, 8, Presence::Online, 2, NOON)], believed).await;
    assert_eq!(stored(fixture, 1).await.map(|known| known.epoch), Some(SessionId(999)));
}

async fn writer_is_told_which_of_its_states_are_older(fixture: &Fixture) {
    fixture.db_fill(3).await;
    let newer = write(2, 90, RESET, 4, NOON);
    assert!(put(fixture, &[newer]).await.is_empty());
    let batch = [1, 2, 3].map(|number| write(number, 50, Presence::Online, 1, NOON));

    let outdone = put(fixture, &batch).await;

    let found: Vec<_> = outdone.iter().map(|row| (row.device, row.known, row.number)).collect();
    assert_eq!(found, [(device(2), newer.known, 4)]);
    assert!(put(fixture, &batch[2..]).await.is_empty(), "written again");
}

async fn row_that_cannot_be_read_is_left_out(fixture: &Fixture) {
    fixture.db_fill(3).await;
    let all = [1, 2, 3].map(|number| write(number, 50, RESET, 1, NOON));
    put(fixture, &all).await;
    let id = if fixture.url.sqlite_path().is_some() {
        "x'00000000000000000000000000000002'"
    } else {
        "'00000000-0000-0000-0000-000000000002'"
    };
    for table in ["presence", "presence_history"] {
        fixture
            .db_run(format!("UPDATE {table} SET evidence = 'x' WHERE device = {id}"))
            .await;
    }

    let page = fixture.store.presence_page(None).await.unwrap();

    let devices: Vec<_> = page.items.iter().map(|row| row.device).collect();
    assert_eq!((devices, page.unreadable), (vec![device(1), device(3)], 1));
    assert_eq!(
        fixture
            .store
            .presence_among(&[device(2), device(3)])
            .await
            .unwrap()
            .len(),
        1
    );
    assert!(
        fixture
            .store
            .presence_history(device(2), None, 9)
            .await
            .unwrap()
            .is_empty()
    );
}

async fn node_that_was_found_gone_is_told(fixture: &Fixture) {
    let boot = Boot {
        node: NodeTag(7),
        epoch: SessionId(9),
    };
    let sign = async || fixture.store.presence_nodes().await.unwrap()[0].sign;
    assert!(!fixture.store.presence_node_write(boot, "a").await.unwrap());
    let written = sign().await.written.unwrap();

    let gone = |written| fixture.store.presence_node_gone(NodeTag(7), written);
    assert!(!gone(written - 1).await.unwrap(), "it has written since");
    assert!(gone(written).await.unwrap());
    assert!(!gone(written).await.unwrap(), "another node has said so");
    assert_eq!(sign().await.written, None);

    assert!(fixture.store.presence_node_write(boot, "a").await.unwrap());
    assert!(sign().await.written.is_some() && !sign().await.is_late);
    assert!(!fixture.store.presence_node_write(boot, "a").await.unwrap(), "once");
}

async fn what_is_forgotten_is_gone(fixture: &Fixture) {
    let both = [
        write(1, 5, Presence::Online, 1, NOON),
        write(2, 5, Presence::Online, 2, NOON),
    ];
    fixture.db_fill(10).await;
    put(fixture, &both).await;

    fixture.store.presence_forget(&[device(1)]).await.unwrap();

    assert_eq!(stored(fixture, 1).await, None);
    assert!(
        fixture
            .store
            .presence_history(device(1), None, 9)
            .await
            .unwrap()
            .is_empty()
    );
    let page = fixture.store.presence_page(None).await.unwrap();
    assert_eq!(page.items.iter().map(|row| row.device).collect::<Vec<_>>(), [device(2)]);
    let left = &page.items[0];
    assert_eq!(
        (left.tenant.as_str(), left.registered_model.as_deref()),
        ("default", None),
        "of the registry"
    );
    assert_eq!(
        (left.model.as_deref(), left.firmware.as_deref()),
        (Some("m"), Some("3.8.0"))
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
        (nodes[0].sign.boot, nodes[0].node.as_str(), nodes[0].sign.is_late),
        (boot(u64::MAX - 8), "b", false)
    );
}

async fn thousand_transitions_are_one_call(fixture: &Fixture) {
    let transitions: Vec<_> = (1..=1_000).map(|n| write(n, 5, Presence::Online, 1, NOON)).collect();
    fixture.db_fill(1_000).await;

    put(fixture, &transitions).await;

    let page = fixture.store.presence_page(None).await.unwrap();
    assert_eq!((page.items.len(), page.next_cursor), (1_000, None));
}
