//! Ops tokens: names, roles and hashes. Each node reads all of them into a copy that it uses while the database is
//! unavailable.

use seawall_proto::id::SecretHash;
use serde_json::{Value as Json, json};
use uuid::Uuid;

use super::{
    Store,
    audit::{self, Change},
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{Audit, NewToken, Role, TokenRow, UNKNOWN_ROLE, from_ms, to_ms},
};

/// Maximum number of valid tokens, so that each node's copy is small. One more is a [`StoreError::Conflict`].
pub const TOKENS_MAX: i64 = 1_000;

/// Reads the whole table, which is small, see [`TOKENS_MAX`]. Includes the newest revoked tokens.
const ALL: Sql = Sql::both(
    "SELECT id, name, role, sha256, created_at, revoked_at FROM tokens \
     ORDER BY revoked_at IS NOT NULL, created_at DESC, id LIMIT 2000",
);

const COUNT: Sql = Sql::both("SELECT count(*) AS count FROM tokens WHERE revoked_at IS NULL");

/// Reads the whole table, which is small.
const NAMED: Sql = Sql::both("SELECT id FROM tokens WHERE name = $1 AND revoked_at IS NULL LIMIT 1");

const INSERT: Sql = Sql::both("INSERT INTO tokens (id, name, role, sha256, created_at) VALUES ($1, $2, $3, $4, $5)");

/// Index: tokens' primary key.
const REVOKE: Sql = Sql::both(
    "UPDATE tokens SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL \
     RETURNING id, name, role, sha256, created_at, revoked_at",
);

impl Store {
    /// Returns every valid token, then the newest revoked ones.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.tokens.all", level = "debug", skip_all)]
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(ALL, &[]).await?;
            held.release();
            rows.iter().map(token_row).collect()
        })
        .await
    }

    /// Adds a token.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] beyond [`TOKENS_MAX`], or a valid token has the name. The database is unavailable or
    /// full.
    #[tracing::instrument(name = "db.tokens.insert", level = "debug", skip_all)]
    pub async fn token_insert(&self, new: &NewToken, audit: &Audit) -> Result<TokenRow, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let count = held.first(COUNT, &[]).await?;
            if count
                .map(|row| row.int("count"))
                .transpose()?
                .flatten()
                .unwrap_or_default()
                >= TOKENS_MAX
            {
                held.rollback().await?;
                return Err(StoreError::Conflict(format!(
                    "there are {TOKENS_MAX} tokens already: revoke some first"
                )));
            }
            if let Some(other) = held.first(NAMED, &[Value::from(new.name.as_str())]).await? {
                let other = other.uuid("id")?;
                held.rollback().await?;
                return Err(StoreError::Conflict(format!(
                    "token {other} has this name: choose another one, or revoke that token first"
                )));
            }
            let values = [
                Value::Uuid(new.id),
                Value::from(new.name.as_str()),
                Value::from(new.role.as_str()),
                (&new.sha256).into(),
                Value::from(to_ms(audit.at)),
            ];
            held.run(INSERT, &values).await?;
            let change = Change {
                subject: new.id.to_string(),
                before: None,
                after: Some(describe(&new.name, Some(new.role), false)),
            };
            audit::record(&mut held, audit, change).await?;
            held.commit().await
        })
        .await?;
        Ok(TokenRow {
            id: new.id,
            name: new.name.clone(),
            role: Some(new.role),
            sha256: new.sha256,
            created_at: audit.at,
            revoked_at: None,
        })
    }

    /// Revokes a token. `Ok(None)`: there is no such token, or it was revoked before.
    ///
    /// # Errors
    /// The database is unavailable or full.
    #[tracing::instrument(name = "db.tokens.revoke", level = "debug", skip_all)]
    pub async fn token_revoke(&self, id: Uuid, audit: &Audit) -> Result<Option<TokenRow>, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let Some(row) = held
                .first(REVOKE, &[Value::Uuid(id), Value::from(to_ms(audit.at))])
                .await?
            else {
                held.rollback().await?;
                return Ok(None);
            };
            let token = token_row(&row)?;
            let change = Change {
                subject: id.to_string(),
                before: Some(describe(&token.name, token.role, false)),
                after: Some(describe(&token.name, token.role, true)),
            };
            audit::record(&mut held, audit, change).await?;
            held.commit().await?;
            Ok(Some(token))
        })
        .await
    }
}

fn describe(name: &str, role: Option<Role>, is_revoked: bool) -> Json {
    json!({ "name": name, "role": role.map_or(UNKNOWN_ROLE, Role::as_str), "revoked": is_revoked })
}

fn token_row(row: &Row) -> Result<TokenRow, StoreError> {
    let corrupt = |column, detail: &str| StoreError::Corrupt {
        table: "tokens",
        column,
        detail: detail.to_owned(),
    };
    let sha256 = row
        .bytes("sha256")?
        .and_then(|bytes| <[u8; 32]>::try_from(&*bytes).ok());
    Ok(TokenRow {
        id: row.uuid("id")?,
        name: row.text("name")?.unwrap_or_default(),
        role: Role::parse(&row.text("role")?.unwrap_or_default()),
        sha256: sha256
            .map(SecretHash::from_bytes)
            .ok_or_else(|| corrupt("sha256", "not 32 bytes"))?,
        created_at: from_ms(row.int("created_at")?.unwrap_or_default()),
        revoked_at: row.int("revoked_at")?.map(from_ms),
    })
}
