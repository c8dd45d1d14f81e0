//! Devices as operators see them.

use std::time::Duration;

use seawall_gateway::store::{DeviceChange, DeviceFilter, NewDevice, Rotation, StoreError, Trouble};
use seawall_proto::{id::SecretHash, record::DeviceState, resume::Generation, time::WallTime};

use super::{Fixture, audit, device, label, new_device, on_both};

on_both!(
    device_is_found_as_it_was_registered,
    second_registration_is_a_conflict_and_changes_nothing,
    change_touches_only_what_it_names,
    rotation_keeps_the_old_secret_for_the_overlap,
    deleted_device_is_gone,
    what_is_not_there_is_none_not_an_error,
    pages_show_every_device_once_and_in_order,
    pages_obey_each_filter,
    row_out_of_bounds_is_refused_by_the_schema,
    calls_side_by_side_all_succeed,
    row_that_can_not_be_read_is_named_in_lists_and_can_be_deleted,
    change_that_changes_nothing_is_not_written,
);

async fn row_that_can_not_be_read_is_named_in_lists_and_can_be_deleted(fixture: &Fixture) {
    let store = &fixture.store;
    fixture.db_fill(5).await;
    let spoil = if fixture.url.sqlite_path().is_some() {
        "UPDATE devices SET updated_at = 'yesterday' WHERE id = unhex('00000000000000000000000000000003')"
    } else {
        "ALTER TABLE devices DROP CONSTRAINT devices_state_check; \
         UPDATE devices SET state = 9 WHERE id = '00000000-0000-0000-0000-000000000003'"
    };
    fixture.db_run(spoil).await;

    let (mut listed, mut unreadable, mut cursor) = (Vec::new(), Vec::new(), None);
    loop {
        let filter = DeviceFilter::default();
        let page = store.devices_page(&filter, cursor, 2).await.unwrap();
        listed.extend(page.items.iter().map(|row| row.record.id));
        unreadable.extend(page.unreadable);
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    let among = store.devices_among(&[device(2), device(3)]).await.unwrap();

    assert_eq!(listed, [1, 2, 4, 5].map(device));
    assert_eq!(unreadable, [device(3)]);
    assert_eq!((among.items.len(), among.unreadable), (1, vec![device(3)]));
    let trouble = store.trouble(Trouble::Unreadable).unwrap();
    assert!(trouble.contains(&device(3).to_string()), "{trouble}");
    assert!(store.device(device(3)).await.is_err());
    let deletion = audit("device.delete", 2);
    assert_eq!(store.device_delete(device(3), &deletion).await.unwrap(), Some(()));
    assert_eq!(store.device(device(3)).await.unwrap(), None);
}

async fn change_that_changes_nothing_is_not_written(fixture: &Fixture) {
    let store = &fixture.store;
    let made = store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let same = DeviceChange {
        state: Some(DeviceState::Enabled),
        ..DeviceChange::default()
    };

    let changed = store.device_update(device(1), &same, &audit("device.update", 2)).await;

    assert_eq!(changed.unwrap(), Some(made));
    assert_eq!(store.revocations_since(None).await.unwrap().revision, Generation(0));
    assert_eq!(store.audit_page(None, 10).await.unwrap().items.len(), 1);
}

async fn device_is_found_as_it_was_registered(fixture: &Fixture) {
    let new = NewDevice {
        external_id: Some(label("CP 01")),
        tenant: Some(label("acme")),
        model: Some(label("Model 3")),
        ..new_device(0)
    };

    let made = fixture
        .store
        .device_insert(&new, &audit("device.create", 7))
        .await
        .unwrap();

    let found = fixture.store.device(device(0)).await.unwrap().unwrap();
    assert_eq!(found, made);
    assert_eq!(
        (found.record.tenant.as_str(), found.record.model),
        ("acme", Some(label("Model 3")))
    );
    assert_eq!(
        (found.record.secret, found.record.state),
        (new.secret, DeviceState::Enabled)
    );
    assert_eq!(
        (found.created_at, found.updated_at),
        (WallTime::from_unix_ms(7), WallTime::from_unix_ms(7))
    );
}

async fn second_registration_is_a_conflict_and_changes_nothing(fixture: &Fixture) {
    let store = &fixture.store;
    let made = store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let other = NewDevice {
        secret: SecretHash::of(b"other"),
        ..new_device(1)
    };

    let again = store.device_insert(&other, &audit("device.create", 2)).await;

    assert!(matches!(again, Err(StoreError::Conflict(_))), "{again:?}");
    assert_eq!(store.device(device(1)).await.unwrap(), Some(made));
    assert_eq!(store.audit_page(None, 10).await.unwrap().items.len(), 1);
}

async fn change_touches_only_what_it_names(fixture: &Fixture) {
    let store = &fixture.store;
    let made = store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let disable = DeviceChange {
        state: Some(DeviceState::Disabled),
        ..DeviceChange::default()
    };
    let rename = DeviceChange {
        model: Some(Some(label("m"))),
        tenant: Some(label("t")),
        ..DeviceChange::default()
    };

    store
        .device_update(device(1), &disable, &audit("device.disable", 2))
        .await
        .unwrap()
        .unwrap();
    let after = store
        .device_update(device(1), &rename, &audit("device.update", 3))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(store.device(device(1)).await.unwrap().unwrap(), after);
    assert_eq!(
        (after.record.state, after.record.secret),
        (DeviceState::Disabled, made.record.secret)
    );
    assert_eq!(
        (after.record.tenant.as_str(), after.record.model.as_deref()),
        ("t", Some("m"))
    );
    assert_eq!(
        (after.created_at, after.updated_at),
        (made.created_at, WallTime::from_unix_ms(3))
    );
}

async fn rotation_keeps_the_old_secret_for_the_overlap(fixture: &Fixture) {
    let store = &fixture.store;
    let old = store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap()
        .record
        .secret;
    let rotation = |secret: &[u8], overlap| Rotation {
        secret: SecretHash::of(secret),
        overlap,
    };

    let first = rotation(b"first", Duration::from_secs(60));
    let first = store
        .device_rotate(device(1), first, &audit("device.rotate", 1_000))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.ended_overlap, None);
    let first = first.row;
    assert_eq!(first.record.secret, SecretHash::of(b"first"));
    assert_eq!(
        first.record.previous_secret,
        Some((old, WallTime::from_unix_ms(61_000)))
    );
    assert_eq!(store.device(device(1)).await.unwrap(), Some(first));

    let second = rotation(b"second", Duration::ZERO);
    let second = store
        .device_rotate(device(1), second, &audit("device.rotate", 2_000))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(second.ended_overlap, Some(WallTime::from_unix_ms(61_000)));
    assert_eq!(second.row.record.previous_secret, None);
    assert_eq!(store.device(device(1)).await.unwrap(), Some(second.row));
}

async fn deleted_device_is_gone(fixture: &Fixture) {
    let store = &fixture.store;
    store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();

    assert_eq!(
        store
            .device_delete(device(1), &audit("device.delete", 2))
            .await
            .unwrap(),
        Some(())
    );

    assert_eq!(store.device(device(1)).await.unwrap(), None);
    assert_eq!(
        store
            .device_delete(device(1), &audit("device.delete", 3))
            .await
            .unwrap(),
        None
    );
}

async fn what_is_not_there_is_none_not_an_error(fixture: &Fixture) {
    let store = &fixture.store;
    let rotation = Rotation {
        secret: SecretHash::of(b"x"),
        overlap: Duration::ZERO,
    };

    assert_eq!(store.device(device(9)).await.unwrap(), None);
    let change = store
        .device_update(device(9), &DeviceChange::default(), &audit("device.update", 1))
        .await;
    assert_eq!(change.unwrap(), None);
    assert_eq!(
        store
            .device_rotate(device(9), rotation, &audit("device.rotate", 1))
            .await
            .unwrap(),
        None
    );
    assert_eq!(store.audit_page(None, 10).await.unwrap().items, []);
}

async fn pages_show_every_device_once_and_in_order(fixture: &Fixture) {
    for number in [3, 0, 2, u128::MAX, 1] {
        fixture
            .store
            .device_insert(&new_device(number), &audit("device.create", 1))
            .await
            .unwrap();
    }

    let mut seen = Vec::new();
    let mut cursor = None;
    loop {
        let page = fixture
            .store
            .devices_page(&DeviceFilter::default(), cursor, 2)
            .await
            .unwrap();
        assert!(page.items.len() <= 2);
        seen.extend(page.items.iter().map(|row| row.record.id));
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }

    assert_eq!(seen, [0, 1, 2, 3, u128::MAX].map(device));
}

async fn pages_obey_each_filter(fixture: &Fixture) {
    let store = &fixture.store;
    for (number, tenant, model) in [(1, "a", "x"), (2, "a", "y"), (3, "b", "x"), (4, "B", "x")] {
        let new = NewDevice {
            external_id: None,
            tenant: Some(label(tenant)),
            model: Some(label(model)),
            ..new_device(number)
        };
        store.device_insert(&new, &audit("device.create", 1)).await.unwrap();
    }
    let revoke = DeviceChange {
        state: Some(DeviceState::Revoked),
        ..DeviceChange::default()
    };
    store
        .device_update(device(3), &revoke, &audit("device.revoke", 2))
        .await
        .unwrap();

    for (tenant, model, state, expected) in [
        (None, None, None, &[1, 2, 3, 4][..]),
        (Some("a"), None, None, &[1, 2]),
        (Some("b"), None, None, &[3]),
        (None, Some("x"), None, &[1, 3, 4]),
        (Some("a"), Some("x"), None, &[1]),
        (None, None, Some(DeviceState::Revoked), &[3]),
        (None, Some("x"), Some(DeviceState::Enabled), &[1, 4]),
        (Some("a"), Some("x"), Some(DeviceState::Disabled), &[]),
    ] {
        let filter = DeviceFilter {
            tenant: tenant.map(label),
            model: model.map(label),
            state,
        };
        let page = store.devices_page(&filter, None, 100).await.unwrap();
        let found: Vec<_> = page.items.iter().map(|row| row.record.id.as_uuid().as_u128()).collect();
        assert_eq!(found, expected, "{filter:?}");
        assert_eq!(page.next_cursor, None);
    }
}

async fn row_out_of_bounds_is_refused_by_the_schema(fixture: &Fixture) {
    fixture.db_fill(1).await;

    for assignment in [
        "state = 7",
        "tenant = ''",
        "tenant = 'caf\u{e9}'",
        "model = 'a\tb'",
        "previous_valid_until = 1",
    ] {
        let sql = format!("UPDATE devices SET {assignment}");
        assert!(fixture.db_try(sql).await.is_err(), "{assignment}");
    }
}

async fn calls_side_by_side_all_succeed(fixture: &Fixture) {
    let calls = (0..50).map(|number| {
        let store = fixture.store.clone();
        tokio::spawn(async move {
            store
                .device_insert(&new_device(number), &audit("device.create", 1))
                .await
                .unwrap();
            store.device(device(number)).await.unwrap().unwrap()
        })
    });

    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }

    let page = fixture
        .store
        .devices_page(&DeviceFilter::default(), None, 100)
        .await
        .unwrap();
    assert_eq!(page.items.len(), 50);
}
