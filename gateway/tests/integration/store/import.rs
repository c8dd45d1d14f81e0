//! Import: all of a file, or nothing.

use seawall_gateway::store::{
    DeviceFilter, ImportLine, ImportReport, ImportRow, LINES_MAX, OnOtherCredential, StoreError,
};
use seawall_proto::id::SecretHash;

use super::{Fixture, audit, device, label, new_device, on_both};

on_both!(
    good_file_is_taken_whole,
    same_credential_is_skipped,
    other_credential_is_a_bad_line_and_nothing_is_taken,
    other_credential_replaces_the_old_one_when_told_to,
    bad_line_keeps_the_whole_file_out,
    id_twice_in_one_file_is_skipped_or_bad,
    bad_lines_are_counted_and_the_first_are_named,
    dropped_import_takes_nothing_and_lets_the_next_one_in,
    second_import_at_once_is_a_conflict,
    import_has_a_bound,
    registry_can_be_written_while_an_import_is_fed,
);

fn line(number: u64, id: u128, secret: &str) -> ImportLine {
    let row = ImportRow {
        external_id: None,
        id: device(id),
        secret: SecretHash::of(secret.as_bytes()),
        tenant: None,
        model: None,
    };
    ImportLine { number, row: Ok(row) }
}

fn bad(number: u64) -> ImportLine {
    ImportLine {
        number,
        row: Err("the id is not a UUID".into()),
    }
}

async fn import(fixture: &Fixture, on_other: OnOtherCredential, lines: Vec<ImportLine>) -> ImportReport {
    let mut import = fixture.store.import(on_other).await.unwrap();
    import.push(lines).await.unwrap();
    import.finish(&audit("device.import", 5)).await.unwrap()
}

async fn count(fixture: &Fixture) -> usize {
    fixture
        .store
        .devices_page(&DeviceFilter::default(), None, 1_000)
        .await
        .unwrap()
        .items
        .len()
}

async fn good_file_is_taken_whole(fixture: &Fixture) {
    let row = ImportRow {
        external_id: None,
        id: device(1),
        secret: SecretHash::of(b"one"),
        tenant: Some(label("t\"'\\")),
        model: Some(label("m")),
    };
    let first = ImportLine {
        number: 2,
        row: Ok(row),
    };

    let mut import = fixture.store.import(OnOtherCredential::Refuse).await.unwrap();
    import.push(vec![first]).await.unwrap();
    import
        .push((3..503).map(|number| line(number, number.into(), "x")).collect())
        .await
        .unwrap();
    let report = import.finish(&audit("device.import", 5)).await.unwrap();

    assert_eq!(
        (report.added, report.updated, report.skipped, report.bad),
        (501, 0, 0, 0)
    );
    let found = fixture.store.device(device(1)).await.unwrap().unwrap();
    assert_eq!(found.record.secret, SecretHash::of(b"one"));
    assert_eq!(
        (found.record.tenant.as_str(), found.record.model),
        ("t\"'\\", Some(label("m")))
    );
    assert_eq!(
        fixture
            .store
            .device(device(502))
            .await
            .unwrap()
            .unwrap()
            .record
            .tenant
            .as_str(),
        "default"
    );
    let records = fixture.store.audit_page(None, 10).await.unwrap().items;
    assert_eq!((records.len(), records[0].action.as_str()), (1, "device.import"));
    assert_eq!(records[0].after.as_ref().unwrap()["added"], 501);
}

async fn same_credential_is_skipped(fixture: &Fixture) {
    let made = fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();

    let report = import(
        fixture,
        OnOtherCredential::Refuse,
        vec![line(2, 1, "secret 1"), line(3, 2, "b")],
    )
    .await;

    assert_eq!((report.added, report.skipped, report.bad), (1, 1, 0));
    assert_eq!(fixture.store.device(device(1)).await.unwrap(), Some(made));
}

async fn other_credential_is_a_bad_line_and_nothing_is_taken(fixture: &Fixture) {
    let made = fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();

    let report = import(
        fixture,
        OnOtherCredential::Refuse,
        vec![line(2, 2, "b"), line(3, 1, "other")],
    )
    .await;

    assert_eq!((report.added, report.updated, report.bad), (0, 0, 1));
    assert_eq!(report.bad_lines[0].number, 3);
    assert_eq!(count(fixture).await, 1);
    assert_eq!(fixture.store.device(device(1)).await.unwrap(), Some(made));
    assert_eq!(fixture.store.audit_page(None, 10).await.unwrap().items.len(), 1);
}

async fn other_credential_replaces_the_old_one_when_told_to(fixture: &Fixture) {
    fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    fixture
        .store
        .device_insert(&new_device(3), &audit("device.create", 1))
        .await
        .unwrap();
    let lines = vec![line(2, 1, "other"), line(3, 2, "b"), line(4, 3, "secret 3")];

    let report = import(fixture, OnOtherCredential::Update, lines).await;

    assert_eq!((report.added, report.updated, report.skipped, report.bad), (1, 1, 1, 0));
    let found = fixture.store.device(device(1)).await.unwrap().unwrap();
    assert_eq!(found.record.secret, SecretHash::of(b"other"));
    let records = fixture.store.audit_page(None, 10).await.unwrap().items;
    let replaced = records
        .iter()
        .find(|record| record.subject == device(1).to_string() && record.action == "device.import");
    assert_eq!(replaced.unwrap().after.as_ref().unwrap()["tenant"], "default");
}

async fn bad_line_keeps_the_whole_file_out(fixture: &Fixture) {
    for on_other in [OnOtherCredential::Refuse, OnOtherCredential::Update] {
        let report = import(fixture, on_other, vec![line(2, 1, "a"), bad(3), line(4, 2, "b")]).await;

        assert_eq!((report.added, report.skipped, report.bad), (0, 0, 1));
        assert_eq!(
            (report.bad_lines[0].number, report.bad_lines[0].reason.as_str()),
            (3, "the id is not a UUID")
        );
        assert_eq!(count(fixture).await, 0);
    }
}

async fn id_twice_in_one_file_is_skipped_or_bad(fixture: &Fixture) {
    let same = import(
        fixture,
        OnOtherCredential::Update,
        vec![line(2, 1, "a"), line(3, 1, "a")],
    )
    .await;
    assert_eq!((same.added, same.skipped, same.bad), (1, 1, 0));

    let mut import = fixture.store.import(OnOtherCredential::Update).await.unwrap();
    import.push(vec![line(2, 7, "a")]).await.unwrap();
    import.push(vec![line(3, 8, "a"), line(4, 7, "b")]).await.unwrap();
    let other = import.finish(&audit("device.import", 5)).await.unwrap();

    assert_eq!((other.added, other.bad, other.bad_lines[0].number), (0, 1, 4));
    assert!(other.bad_lines[0].reason.contains("line 2"), "{:?}", other.bad_lines);
    assert_eq!(count(fixture).await, 1);
}

async fn bad_lines_are_counted_and_the_first_are_named(fixture: &Fixture) {
    fixture.db_fill(150).await;
    let mut lines: Vec<_> = (1..=150_u64)
        .map(|number| line(2 * number, number.into(), "other"))
        .collect();
    lines.push(bad(5));

    let report = import(fixture, OnOtherCredential::Refuse, lines).await;

    assert_eq!((report.bad, report.bad_lines.len()), (151, 100));
    let numbers: Vec<_> = report.bad_lines.iter().map(|line| line.number).collect();
    assert_eq!(numbers[..4], [2, 4, 5, 6]);
    assert!(numbers.is_sorted());
}

async fn dropped_import_takes_nothing_and_lets_the_next_one_in(fixture: &Fixture) {
    let mut dropped = fixture.store.import(OnOtherCredential::Refuse).await.unwrap();
    dropped.push(vec![line(2, 1, "a")]).await.unwrap();
    drop(dropped);

    let report = import(fixture, OnOtherCredential::Refuse, vec![line(2, 2, "b")]).await;

    assert_eq!(report.added, 1);
    assert_eq!(fixture.store.device(device(1)).await.unwrap(), None);
}

async fn second_import_at_once_is_a_conflict(fixture: &Fixture) {
    let _first = fixture.store.import(OnOtherCredential::Refuse).await.unwrap();

    let second = fixture.store.import(OnOtherCredential::Refuse).await;

    assert!(matches!(second, Err(StoreError::Conflict(_))));
}

async fn import_has_a_bound(fixture: &Fixture) {
    let mut import = fixture.store.import(OnOtherCredential::Refuse).await.unwrap();

    // Bad lines are counted as well, and cost the database nothing.
    import.push((0..LINES_MAX).map(bad).collect()).await.unwrap();
    let beyond = import.push(vec![bad(LINES_MAX + 1)]).await;

    assert!(matches!(beyond, Err(StoreError::Invalid(_))));
    assert!(import.finish(&audit("device.import", 5)).await.is_err());
}

async fn registry_can_be_written_while_an_import_is_fed(fixture: &Fixture) {
    let mut import = fixture.store.import(OnOtherCredential::Refuse).await.unwrap();
    import.push(vec![line(2, 1, "a")]).await.unwrap();

    fixture
        .store
        .device_insert(&new_device(9), &audit("device.create", 1))
        .await
        .unwrap();

    assert_eq!(import.finish(&audit("device.import", 5)).await.unwrap().added, 1);
    assert_eq!(count(fixture).await, 2);
}
