//! The plan guard, on tables of realistic size.

use seawall_gateway::store::PlanReport;

use super::{Fixture, on_both};

/// Large enough that a database would avoid a full scan.
const DEVICES: u32 = 50_000;

on_both!(
    look_ups_go_through_the_primary_key,
    missing_primary_key_is_an_alarm,
    small_table_is_exempt,
);

async fn look_ups_go_through_the_primary_key(fixture: &Fixture) {
    assert_eq!(fixture.store.plan_check().await.unwrap(), PlanReport::Indexed);

    fixture.db_fill(DEVICES).await;

    assert_eq!(fixture.store.plan_check().await.unwrap(), PlanReport::Indexed);
}

/// Drops the primary key of `devices`, and keeps its other indexes.
async fn db_drop_primary_key(fixture: &Fixture) {
    if fixture.url.sqlite_path().is_some() {
        fixture
            .db_run(
                "CREATE TABLE copy AS SELECT * FROM devices; DROP TABLE devices; ALTER TABLE copy RENAME TO devices; \
                 CREATE INDEX devices_by_tenant ON devices (tenant, id)",
            )
            .await;
    } else {
        fixture.db_run("ALTER TABLE devices DROP CONSTRAINT devices_pkey").await;
    }
}

async fn missing_primary_key_is_an_alarm(fixture: &Fixture) {
    fixture.db_fill(DEVICES).await;
    db_drop_primary_key(fixture).await;

    let report = fixture.store.plan_check().await.unwrap();

    let PlanReport::Alarm(text) = report else {
        panic!("a table of {DEVICES} devices without a primary key went unseen");
    };
    assert!(text.contains("devices"), "{text}");
}

async fn small_table_is_exempt(fixture: &Fixture) {
    fixture.db_fill(500).await;
    db_drop_primary_key(fixture).await;

    assert_eq!(fixture.store.plan_check().await.unwrap(), PlanReport::Indexed);
}

mod views {
    use std::time::Duration;

    use seawall_gateway::store::PlanReport;

    use crate::store::{Fixture, device};

    /// Like load tests: makes the lookup of marked ids costly, inside the database.
    const VIEW: &str = "ALTER TABLE devices RENAME TO devices_stored; \
        CREATE FUNCTION dear(id uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS \
        $$ BEGIN IF id::text LIKE '%01' THEN PERFORM pg_sleep(0.05); END IF; RETURN true; END $$; \
        CREATE VIEW devices AS SELECT * FROM devices_stored WHERE dear(id)";

    #[tokio::test]
    async fn view_in_place_of_the_table_is_looked_through() {
        let fixture = Fixture::postgres().await;
        fixture.db_fill(super::DEVICES).await;
        fixture.db_run(VIEW).await;

        assert_eq!(fixture.store.plan_check().await.unwrap(), PlanReport::Indexed);
        let mut worker = fixture.store.lookup_worker();
        let found = worker
            .find(&[device(1), device(2)], Duration::from_secs(1))
            .await
            .unwrap();
        assert_eq!(found.records.len(), 2);

        fixture
            .db_run("ALTER TABLE devices_stored DROP CONSTRAINT devices_pkey")
            .await;
        assert!(fixture.store.plan_check().await.unwrap().is_alarm());
    }
}
