//! Firmware rules and their revision, over a connection of their own: a storm of look-ups never delays a rule.

use super::{
    RULES_MAX_TIME, Store,
    connection::{Row, Sql},
    error::StoreError,
};

/// Index: meta's primary key.
const REVISION: Sql = Sql::both("SELECT value AS revision FROM meta WHERE key = 'rules_revision'");

impl Store {
    /// The revision of the rule set: it grows with every change of any rule.
    ///
    /// # Errors
    /// The database did not answer within 2 s.
    #[tracing::instrument(name = "db.meta.find", level = "debug", skip_all)]
    pub async fn rules_revision(&self) -> Result<u64, StoreError> {
        self.observed(RULES_MAX_TIME, async {
            let mut held = self.rules_lane().take().await?;
            let row = held.first(REVISION, &[]).await?;
            held.give_back();
            revision(row.as_ref())
        })
        .await
    }
}

/// Stored as text, as every value of `meta`.
fn revision(row: Option<&Row>) -> Result<u64, StoreError> {
    let text = row.map(|row| row.text("revision")).transpose()?.flatten();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| StoreError::Corrupt {
            table: "meta",
            column: "value",
            detail: "rules_revision is not a number".into(),
        })
}
