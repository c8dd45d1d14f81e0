//! Tokens and the audit log.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use seawall_gateway::store::{
    AUDIT_PRUNE_MAX, AuditEntry, AuditRecord, Change, DeviceChange, ImportLine, ImportRow, NewToken, OnOtherCredential,
    Role, Rotation, StoreError, TOKENS_MAX,
};
use seawall_proto::{id::SecretHash, record::DeviceState, time::WallTime};
use serde_json::json;
use uuid::Uuid;

use super::{Fixture, audit, device, new_device, on_both};

on_both!(
    token_is_listed_until_and_after_it_is_revoked,
    tokens_have_a_bound,
    every_change_is_in_the_audit_log,
    audit_log_holds_no_secret_and_no_hash,
    audit_pages_are_newest_first,
    old_audit_records_are_deleted_from_the_oldest_on_and_that_is_recorded,
);

fn token(number: u128) -> NewToken {
    NewToken {
        id: Uuid::from_u128(number),
        name: format!("token {number}"),
        role: Role::Operator,
        sha256: SecretHash::of(&number.to_be_bytes()),
    }
}

async fn records(fixture: &Fixture) -> Vec<AuditRecord> {
    fixture.store.audit_page(None, 1_000).await.unwrap().items
}

async fn token_is_listed_until_and_after_it_is_revoked(fixture: &Fixture) {
    let store = &fixture.store;
    let made = store.token_insert(&token(1), &audit("token.create", 1)).await.unwrap();
    assert_eq!(store.tokens().await.unwrap(), [made]);

    let revoked = store
        .token_revoke(Uuid::from_u128(1), &audit("token.revoke", 2))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(revoked.revoked_at, Some(WallTime::from_unix_ms(2)));
    assert_eq!(store.tokens().await.unwrap(), [revoked]);
    assert_eq!(
        store
            .token_revoke(Uuid::from_u128(1), &audit("token.revoke", 3))
            .await
            .unwrap(),
        None
    );
    let twice = store.token_insert(&token(1), &audit("token.create", 4)).await;
    assert!(matches!(twice, Err(StoreError::Conflict(_))), "{twice:?}");
}

async fn tokens_have_a_bound(fixture: &Fixture) {
    let values = (0..TOKENS_MAX).map(|number| {
        let (id, hash) = (Uuid::from_u128(number as u128), format!("{number:064x}"));
        if fixture.url.sqlite_path().is_some() {
            format!("(x'{}', 'n', 'viewer', x'{hash}', 1)", id.simple())
        } else {
            format!("('{id}', 'n', 'viewer', '\\x{hash}', 1)")
        }
    });
    let values = values.collect::<Vec<_>>().join(",");
    fixture
        .db_run(format!(
            "INSERT INTO tokens (id, name, role, sha256, created_at) VALUES {values}"
        ))
        .await;

    let beyond = fixture
        .store
        .token_insert(&token(u128::MAX), &audit("token.create", 1))
        .await;

    assert!(matches!(beyond, Err(StoreError::Conflict(_))), "{beyond:?}");
}

async fn every_change_is_in_the_audit_log(fixture: &Fixture) {
    let store = &fixture.store;
    let rotation = Rotation {
        secret: SecretHash::of(b"new"),
        overlap: Duration::from_secs(1),
    };
    let change = DeviceChange {
        state: Some(DeviceState::Disabled),
        ..DeviceChange::default()
    };
    store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    store
        .device_update(device(1), &change, &audit("device.disable", 2))
        .await
        .unwrap();
    store
        .device_rotate(device(1), rotation, &audit("device.rotate", 3))
        .await
        .unwrap();
    store
        .device_delete(device(1), &audit("device.delete", 4))
        .await
        .unwrap();
    store.token_insert(&token(1), &audit("token.create", 5)).await.unwrap();
    store
        .token_revoke(Uuid::from_u128(1), &audit("token.revoke", 6))
        .await
        .unwrap();
    let entry = AuditEntry::new(&audit("drain.start", 7), Change::to("node", json!({"rate": 5})));
    store.audit_append(&entry).await.unwrap();
    // As if its outcome were not known: the journal has it as well.
    let waited = AuditEntry::new(&audit("drain.cancel", 8), Change::of("node"));
    for _ in 0..2 {
        let arrived_at = WallTime::from_unix_ms(99);
        store
            .audit_arrive(&[entry.clone(), waited.clone()], arrived_at)
            .await
            .unwrap();
    }

    let mut records = records(fixture).await;

    records.reverse();
    let actions: Vec<_> = records.iter().map(|record| record.action.as_str()).collect();
    let expected = [
        "device.create",
        "device.disable",
        "device.rotate",
        "device.delete",
        "token.create",
        "token.revoke",
        "drain.start",
        "drain.cancel",
    ];
    assert_eq!(actions, expected);
    let arrived: Vec<_> = records.iter().filter_map(|record| record.arrived_at).collect();
    assert_eq!(arrived, [WallTime::from_unix_ms(99)], "only one of them waited");
    for (index, record) in records.iter().enumerate() {
        assert_eq!(
            (record.actor.as_str(), record.at.as_unix_ms()),
            ("alice", index as u64 + 1)
        );
    }
    let state = |index: usize, side: fn(&AuditRecord) -> &Option<serde_json::Value>| {
        side(&records[index]).as_ref().unwrap()["state"].clone()
    };
    assert_eq!(records[0].before, None);
    assert_eq!(state(0, |record| &record.after), "enabled");
    assert_eq!(
        (state(1, |record| &record.before), state(1, |record| &record.after)),
        (json!("enabled"), json!("disabled"))
    );
    assert_eq!(records[2].after.as_ref().unwrap()["previous_secret_until_ms"], 1_003);
    assert_eq!(
        (state(3, |record| &record.before), &records[3].after),
        (json!("disabled"), &None)
    );
    assert_eq!(
        (records[6].subject.as_str(), &records[6].after),
        ("node", &Some(json!({"rate": 5})))
    );
}

async fn audit_log_holds_no_secret_and_no_hash(fixture: &Fixture) {
    let store = &fixture.store;
    let mut hashes = vec![
        new_device(1).secret,
        SecretHash::of(b"rotated"),
        SecretHash::of(b"imported"),
        token(1).sha256,
    ];
    hashes.extend([SecretHash::of(b"second import")]);
    store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    let rotation = Rotation {
        secret: hashes[1],
        overlap: Duration::from_secs(9),
    };
    store
        .device_rotate(device(1), rotation, &audit("device.rotate", 2))
        .await
        .unwrap();
    for secret in [hashes[2], hashes[4]] {
        let mut import = store.import(OnOtherCredential::Update).await.unwrap();
        let row = ImportRow {
            external_id: None,
            id: device(1),
            secret,
            tenant: None,
            model: None,
        };
        import
            .push(vec![ImportLine {
                number: 2,
                row: Ok(row),
            }])
            .await
            .unwrap();
        import.finish(&audit("device.import", 3)).await.unwrap();
    }
    store
        .device_delete(device(1), &audit("device.delete", 4))
        .await
        .unwrap();
    store.token_insert(&token(1), &audit("token.create", 5)).await.unwrap();
    store
        .token_revoke(Uuid::from_u128(1), &audit("token.revoke", 6))
        .await
        .unwrap();

    let records = records(fixture).await;

    assert_eq!(records.len(), 9);
    let text = serde_json::to_string(&records).unwrap().to_lowercase();
    for hash in hashes {
        let hex: String = hash.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let base64 = STANDARD.encode(hash.as_bytes()).to_lowercase();
        assert!(
            !text.contains(&hex) && !text.contains(&base64[..40]),
            "a hash is in {text}"
        );
    }
    assert!(!text.contains("sha256") && !text.contains("\"secret\""), "{text}");
}

async fn audit_pages_are_newest_first(fixture: &Fixture) {
    for number in 1..=5 {
        fixture
            .store
            .audit_append(&AuditEntry::new(&audit("test", number), Change::of("subject")))
            .await
            .unwrap();
    }

    let first = fixture.store.audit_page(None, 2).await.unwrap();
    let second = fixture.store.audit_page(first.next_cursor, 2).await.unwrap();
    let third = fixture.store.audit_page(second.next_cursor, 2).await.unwrap();

    let times = [&first, &second, &third].map(|page| {
        page.items
            .iter()
            .map(|record| record.at.as_unix_ms())
            .collect::<Vec<_>>()
    });
    assert_eq!(times, [vec![5, 4], vec![3, 2], vec![1]]);
    assert_eq!(third.next_cursor, None);
}

async fn old_audit_records_are_deleted_from_the_oldest_on_and_that_is_recorded(fixture: &Fixture) {
    let rows = AUDIT_PRUNE_MAX + 5;
    let numbers = if fixture.url.sqlite_path().is_some() {
        format!("WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {rows}) SELECT n FROM n")
    } else {
        format!("SELECT n FROM generate_series(1, {rows}) n")
    };
    let insert =
        format!("INSERT INTO audit (at, actor, action, subject) SELECT n, 'a', 'test', 's' FROM ({numbers}) t");
    fixture.db_run(insert).await;
    let prune = async |before, at| {
        let audit = audit("audit.prune", at);
        let pruned = fixture.store.audit_prune(WallTime::from_unix_ms(before), &audit);
        pruned.await.unwrap()
    };

    assert_eq!(prune(1, 1_000_000).await, 0);
    assert_eq!(prune(u64::from(rows), 1_000_000).await, u64::from(AUDIT_PRUNE_MAX));
    assert_eq!(prune(u64::from(rows), 1_000_001).await, 4);
    assert_eq!(prune(u64::from(rows), 1_000_002).await, 0);

    let left = records(fixture).await;
    let left: Vec<_> = left
        .iter()
        .map(|record| (record.action.as_str(), &record.after))
        .collect();
    let pruned = |deleted| Some(json!({ "before_ms": rows, "deleted": deleted }));
    assert_eq!(
        left,
        [
            ("audit.prune", &pruned(4)),
            ("audit.prune", &pruned(AUDIT_PRUNE_MAX)),
            ("test", &None)
        ]
    );
}
