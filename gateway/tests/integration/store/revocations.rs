//! Revocations of resume tokens: one revision per change, in order, and never lost by pruning.

use std::{collections::BTreeSet, time::Duration};

use seawall_gateway::store::{DeviceChange, ImportLine, ImportRow, OnOtherCredential, Rotation};
use seawall_proto::{
    id::SecretHash,
    record::DeviceState,
    resume::{Generation, REVOKED_MAX},
    time::WallTime,
};

use super::{Fixture, audit, device, label, new_device, on_both, within};

on_both!(
    every_change_of_a_device_is_a_revision_and_a_registration_is_none,
    import_revokes_the_devices_that_got_another_credential,
    reader_that_follows_the_revision_misses_nothing_while_many_write,
    old_revocations_are_pruned_and_the_floor_keeps_what_they_said,
    pruning_bounds_the_number_of_revocations,
    registry_behind_its_nodes_leaps_ahead_of_them,
);

async fn every_change_of_a_device_is_a_revision_and_a_registration_is_none(fixture: &Fixture) {
    let store = &fixture.store;
    for n in 1..=4 {
        store
            .device_insert(&new_device(n), &audit("device.create", 1))
            .await
            .unwrap();
    }
    assert_eq!(store.revocations_since(None).await.unwrap().revision, Generation(0));
    let audit = audit("device.update", 2);
    let moved = DeviceChange {
        tenant: Some(label("elsewhere")),
        ..DeviceChange::default()
    };
    let disabled = DeviceChange {
        state: Some(DeviceState::Disabled),
        ..DeviceChange::default()
    };
    let rotation = Rotation {
        secret: SecretHash::of(b"new"),
        overlap: Duration::from_hours(1),
    };

    store.device_update(device(1), &moved, &audit).await.unwrap().unwrap();
    store
        .device_update(device(2), &disabled, &audit)
        .await
        .unwrap()
        .unwrap();
    store.device_rotate(device(3), rotation, &audit).await.unwrap().unwrap();
    store.device_delete(device(4), &audit).await.unwrap().unwrap();
    assert_eq!(store.device_delete(device(4), &audit).await.unwrap(), None);
    store.revoke_tokens(device(9), WallTime::from_unix_ms(3)).await.unwrap();

    let all = store.revocations_since(None).await.unwrap();
    assert_eq!((all.revision, all.floor), (Generation(5), Generation(0)));
    let newest_first = [(9, 5), (4, 4), (3, 3), (2, 2), (1, 1)].map(|(n, at)| (device(n), Generation(at)));
    assert_eq!(all.devices, newest_first);
    let since = store.revocations_since(Some(Generation(3))).await.unwrap();
    assert_eq!(since.devices, newest_first[..2]);
    let none = store.revocations_since(Some(Generation(5))).await.unwrap();
    assert_eq!(none.devices, []);
}

async fn import_revokes_the_devices_that_got_another_credential(fixture: &Fixture) {
    let store = &fixture.store;
    fixture.db_fill(3).await;
    let lines = |secrets: [&'static [u8]; 3]| {
        let lines = secrets.into_iter().zip(2_u64..).map(|(secret, number)| ImportLine {
            number,
            row: Ok(ImportRow {
                external_id: None,
                id: device(u128::from(number)),
                secret: SecretHash::of(secret),
                tenant: None,
                model: None,
            }),
        });
        lines.collect::<Vec<_>>()
    };

    // Devices 2 and 3 exist, 4 is new.
    for (secrets, revision) in [
        ([b"a", b"b", b"c"], 1),
        ([b"a", b"b", b"c"], 1),
        ([b"a", b"x", b"c"], 2),
    ] {
        let mut import = store.import(OnOtherCredential::Update).await.unwrap();
        import.push(lines(secrets.map(|secret| &secret[..]))).await.unwrap();
        import.finish(&audit("device.import", 5)).await.unwrap();

        assert_eq!(
            store.revocations_since(None).await.unwrap().revision,
            Generation(revision)
        );
    }

    let all = store.revocations_since(None).await.unwrap();
    let devices: BTreeSet<_> = all.devices.into_iter().collect();
    let expected = [(2, 1), (3, 1), (3, 2)].map(|(n, at)| (device(n), Generation(at)));
    assert_eq!(devices, expected.into());
}

async fn reader_that_follows_the_revision_misses_nothing_while_many_write(fixture: &Fixture) {
    const WRITERS: u128 = 6;
    const CHANGES: u32 = 15;
    for n in 1..=WRITERS {
        let new = new_device(n);
        fixture
            .store
            .device_insert(&new, &audit("device.create", 1))
            .await
            .unwrap();
    }
    let writers = (1..=WRITERS).map(|n| {
        let store = fixture.store.clone();
        tokio::spawn(async move {
            for change_number in 0..CHANGES {
                let change = DeviceChange {
                    // Another each time: what changes nothing revokes nothing.
                    model: Some(Some(label(&format!("m{change_number}")))),
                    ..DeviceChange::default()
                };
                let audit = audit("device.update", 2);
                store.device_update(device(n), &change, &audit).await.unwrap().unwrap();
            }
        })
    });
    let writers = writers.collect::<Vec<_>>();

    let total = u32::try_from(WRITERS).unwrap() * CHANGES;
    let follow = async {
        let mut seen = BTreeSet::new();
        let mut known = Generation(0);
        while known.0 < total {
            let news = fixture.store.revocations_since(Some(known)).await.unwrap();
            seen.extend(news.devices.iter().map(|(_, at)| at.0));
            known = news.revision;
        }
        seen
    };
    let seen = within(follow).await;

    for writer in writers {
        writer.await.unwrap();
    }
    assert!(seen.iter().copied().eq(1..=total), "{seen:?}");
}

async fn old_revocations_are_pruned_and_the_floor_keeps_what_they_said(fixture: &Fixture) {
    let store = &fixture.store;
    let day = Duration::from_hours(24);
    let start = WallTime::from_unix_ms(1_800_000_000_000);
    for (n, days) in [(1, 0), (2, 1), (3, 5)] {
        store.revoke_tokens(device(n), start + day * days).await.unwrap();
    }

    store.revocations_prune(start + day * 7).await.unwrap();
    assert_eq!(store.revocations_since(None).await.unwrap().devices.len(), 3);
    store.revocations_prune(start + day * 10).await.unwrap();

    let left = store.revocations_since(None).await.unwrap();
    assert_eq!((left.revision, left.floor), (Generation(3), Generation(2)));
    assert_eq!(left.devices, [(device(3), Generation(3))]);
}

async fn pruning_bounds_the_number_of_revocations(fixture: &Fixture) {
    let many = REVOKED_MAX + 10;
    let sql = if fixture.url.sqlite_path().is_some() {
        format!(
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {many}) \
             INSERT INTO revocations SELECT n, unhex(printf('%032x', n)), 1 FROM n"
        )
    } else {
        format!("INSERT INTO revocations SELECT n, lpad(to_hex(n), 32, '0')::uuid, 1 FROM generate_series(1, {many}) n")
    };
    let revision = format!("UPDATE meta SET value = '{many}' WHERE key = 'revocations_revision'");
    fixture.db_run(format!("{sql}; {revision}")).await;

    fixture
        .store
        .revocations_prune(WallTime::from_unix_ms(1))
        .await
        .unwrap();

    let left = fixture.store.revocations_since(None).await.unwrap();
    assert_eq!((left.devices.len(), left.floor), (REVOKED_MAX, Generation(10)));
}

async fn registry_behind_its_nodes_leaps_ahead_of_them(fixture: &Fixture) {
    let store = &fixture.store;
    store.revoke_tokens(device(1), WallTime::from_unix_ms(1)).await.unwrap();

    store.revoke_all_tokens(Generation(40)).await.unwrap();
    store.revoke_all_tokens(Generation(7)).await.unwrap();

    let now = store.revocations_since(Some(Generation(40))).await.unwrap();
    assert_eq!((now.revision, now.floor), (Generation(41), Generation(41)));
}
