//! The registered devices in pages, as each node reads them for its roster.

use std::collections::BTreeMap;

use seawall_gateway::store::{DEFAULT_TENANT, NewDevice};

use super::{Fixture, audit, device, label, new_device, on_both};

on_both!(
    pages_show_every_device_once_with_its_tenant,
    empty_registry_is_one_empty_page,
);

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
        let page = fixture.store.roster_page(cursor.as_ref()).await.unwrap();
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

async fn empty_registry_is_one_empty_page(fixture: &Fixture) {
    let page = fixture.store.roster_page(None).await.unwrap();

    assert!(page.items.is_empty() && page.next_cursor.is_none());
}
