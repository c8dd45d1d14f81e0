//! The registered devices in pages, as nodes read them for their registry index.

use std::{collections::BTreeMap, time::Duration};

use seawall_gateway::store::{DEFAULT_TENANT, NewDevice};
use seawall_proto::{resume::Generation, time::WallTime};

use super::{Fixture, audit, device, label, new_device, on_both};

on_both!(
    pages_show_every_device_once_with_its_tenant,
    empty_registry_is_one_empty_page,
    registered_devices_among_others_are_named,
    devices_changed_after_a_revision_are_named_once_whatever_the_clock_said,
);

#[tokio::test]
async fn row_that_can_not_be_read_does_not_hide_the_others() {
    let fixture = Fixture::sqlite().await;
    fixture.db_fill(3).await;
    let spoil = "UPDATE devices SET tenant = CAST('a' AS BLOB) WHERE id = unhex('00000000000000000000000000000002')";
    fixture.db_run(spoil).await;

    let page = fixture.store.registry_index_page(None).await.unwrap();

    let read: Vec<_> = page.items.iter().map(|row| row.device).collect();
    assert_eq!((read, page.next_cursor), (vec![device(1), device(3)], None));
}

async fn pages_show_every_device_once_with_its_tenant(fixture: &Fixture) {
    fixture.db_fill(4_500).await;
    for (number, tenant) in [(9_001, "acme"), (9_002, "zeta"), (9_003, "acme")] {
        let new = NewDevice {
            external_id: None,
            tenant: Some(label(tenant)),
            ..new_device(number)
        };
        fixture
            .store
            .device_insert(&new, &audit("device.create", 1))
            .await
            .unwrap();
    }

    let (mut read, mut pages, mut cursor) = (Vec::new(), 0, None);
    loop {
        let page = fixture.store.registry_index_page(cursor.as_ref()).await.unwrap();
        pages += 1;
        read.extend(page.items);
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }

    let tenants: BTreeMap<_, _> = read.iter().map(|row| (row.device, row.tenant.as_str())).collect();
    assert_eq!((pages, read.len(), tenants.len()), (3, 4_503, 4_503));
    assert_eq!(tenants[&device(4_500)], DEFAULT_TENANT);
    assert_eq!(
        [9_001, 9_002, 9_003].map(|n| tenants[&device(n)]),
        ["acme", "zeta", "acme"]
    );
}

async fn devices_changed_after_a_revision_are_named_once_whatever_the_clock_said(fixture: &Fixture) {
    let store = &fixture.store;
    for (number, at_ms) in [(1, 9_000), (2, 8_000), (2, 10), (3, 5)] {
        store
            .revoke_tokens(device(number), WallTime::from_unix_ms(at_ms))
            .await
            .unwrap();
    }

    let changed = async |revision| store.changed_after(Generation(revision)).await.unwrap();
    assert_eq!(changed(0).await, [1, 2, 3].map(device).into());
    assert_eq!(changed(1).await, [2, 3].map(device).into());
    assert!(changed(4).await.is_empty());
    let since = store.changed_since(WallTime::from_unix_ms(8_100), Duration::from_millis(100));
    assert_eq!(since.await.unwrap(), [1, 2].map(device).into());
}

async fn registered_devices_among_others_are_named(fixture: &Fixture) {
    fixture.db_fill(3).await;

    let present = fixture.store.present_among(&[2, 3, 4, 5].map(device)).await.unwrap();

    assert_eq!(present, [2, 3].map(device).into());
    assert!(fixture.store.present_among(&[]).await.unwrap().is_empty());
}

async fn empty_registry_is_one_empty_page(fixture: &Fixture) {
    let page = fixture.store.registry_index_page(None).await.unwrap();

    assert!(page.items.is_empty() && page.next_cursor.is_none());
}
