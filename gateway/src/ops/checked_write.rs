//! Writes of rules for a caller of the API: checked, written, and checked again if rules were written meanwhile. Start
//! with [`checked`].

use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSpec},
};
use tokio::time::{Instant, timeout_at};

use super::{
    Api, call,
    problem::{Code, Problem},
};
use crate::{
    node::{
        State as Gateway,
        rule_write::{self, Author, Permission, Place, WriteError},
    },
    store::{Audit, StoreError},
};

/// Maximum number of checks of one write.
const CHECKS_MAX: u32 = 3;

/// Asks `check` for the permission, and makes the change by `write`. If rules were written in between, it does both
/// again. A write that takes longer than until `deadline` continues.
pub(super) async fn checked<T, C, W>(
    api: &Api,
    deadline: Instant,
    check: impl Fn() -> C,
    write: impl Fn(Permission) -> W,
) -> Result<T, Problem>
where
    T: Send + 'static,
    C: Future<Output = Result<Permission, Problem>>,
    W: Future<Output = Result<T, WriteError>> + Send + 'static,
{
    let mut checks = 0;
    loop {
        checks += 1;
        let writing = api.carry_out(write(check().await?));
        match timeout_at(deadline, writing)
            .await
            .map_err(|_| StoreError::TimedOut)??
        {
            Err(WriteError::Store(StoreError::Outdated)) if checks < CHECKS_MAX => {}
            written => return Ok(written?),
        }
    }
}

/// Puts a rule in force that the database has taken, with an event and a log line.
pub(super) async fn made_or_changed(
    gateway: &Gateway,
    id: RuleId,
    place: Place<Rule>,
    spec: &RuleSpec,
    audit: &Audit,
    change: &'static str,
) -> Place<Rule> {
    rule_write::made_or_changed(gateway, id, place, spec, author(audit, &call::current_id()), change).await
}

/// The caller of the API.
pub(super) fn author<'a>(audit: &'a Audit, request: &'a str) -> Author<'a> {
    let name = &audit.actor;
    Author { name, request }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Store(error) => error.into(),
            WriteError::Journal { database, journal } => Self::new(
                Code::DatabaseUnavailable,
                format!(
                    "nothing was changed: the database can't take it ({database}), nor can this node's journal: {journal}"
                ),
            ),
        }
    }
}
