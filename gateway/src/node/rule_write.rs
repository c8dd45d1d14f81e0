//! Writes of rules: to the database, or to this node's journal if the database can't take them. Start with [`write()`].

use std::time::Duration;

use seawall_proto::{
    firmware::Range,
    id::RuleId,
    rules::{LocalWrite, Rule, RuleSpec},
};
use tokio::time::{Instant, timeout, timeout_at};

use super::State;
use crate::{
    fleet::{
        events::Body as Event,
        rules::{JournalError, Written},
    },
    store::{Audit, Consent, StoreError},
};

/// Maximum time to put a written rule in force. A write has 2 s, of which the store has 1.7 s. Ten thousand rules are
/// compiled within a few hundredths of a second.
const APPLY_MAX: Duration = Duration::from_millis(150);
/// Maximum time of a check and the write after it, [`APPLY_MAX`] included.
pub const WRITE_MAX: Duration = Duration::from_millis(1_950);
/// Time at the end of [`WRITE_MAX`] to keep a change in the journal, and to put it in force.
const JOURNAL_TIME: Duration = Duration::from_millis(250);

/// How a change of a rule may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// In the database, on these terms.
    Stored(Consent),
    /// On this node alone: the devices of other nodes are not known.
    Local,
}

/// Where a change is.
#[derive(Debug)]
pub enum Place<T> {
    Database(T),
    /// In this node's journal.
    Journal,
}

/// Why a change was not made.
#[derive(Debug)]
pub enum WriteError {
    Store(StoreError),
    Journal {
        /// Why the database can't take it.
        database: String,
        journal: JournalError,
    },
}

/// Makes a change of a rule: by `direct` in the database, or else in the journal. In force when this returns. The
/// database is not asked while earlier changes wait in the journal, so that they reach it in order. Only `direct` knows
/// the revision that the rule has in the database. For the journal, this node's must be `expected`.
///
/// # Errors
/// It is neither here nor there. After a timeout that is not known.
pub async fn write<T>(
    state: &State,
    change: LocalWrite,
    permission: Permission,
    deadline: Instant,
    expected: impl FnOnce(u64) -> bool,
    direct: impl AsyncFnOnce(Consent) -> Result<T, StoreError>,
) -> Result<Place<T>, WriteError> {
    let waits = !state.rules.local().writes.is_empty();
    let refused = match permission {
        _ if waits => "earlier changes wait in the journal".to_owned(),
        Permission::Local => "it does not answer".to_owned(),
        Permission::Stored(_) if state.store.is_away() => {
            let reason = state.store.state().reason;
            reason.unwrap_or_else(|| "it does not answer".to_owned())
        }
        Permission::Stored(consent) => {
            let written = timeout_at(deadline - JOURNAL_TIME, direct(consent)).await;
            match written.unwrap_or(Err(StoreError::TimedOut)) {
                Ok(written) => return Ok(Place::Database(written)),
                // A write whose outcome is not known has the same id in the journal, and is made once.
                Err(error) if error.is_for_journal() => error.to_string(),
                Err(error) => return Err(WriteError::Store(error)),
            }
        }
    };
    let revision = state.rules.current().get(change.rule).map(|rule| rule.revision);
    if let Some(revision) = revision
        && !expected(revision)
    {
        return Err(WriteError::Store(StoreError::OtherRevision(revision)));
    }
    let kept = state.rules.write_local(change, &state.clock, &state.events);
    match kept.await {
        Ok(()) => Ok(Place::Journal),
        Err(error @ JournalError::Changed) => Err(WriteError::Store(StoreError::Conflict(error.to_string()))),
        Err(journal) => Err(WriteError::Journal {
            database: refused,
            journal,
        }),
    }
}

/// Puts a written change in force on this node. Makes no query.
pub async fn apply(state: &State, written: Written) {
    let id = written.id();
    let applying = state.rules.apply(&written, &state.clock, &state.events);
    if timeout(APPLY_MAX, applying).await.is_err() {
        tracing::warn!(rule.id = %id, "written rule not in force in time: the next poll applies it");
    }
}

/// A change of a rule as the journal keeps it.
#[must_use]
pub fn local_write(
    rule: RuleId,
    audit: &Audit,
    is_confirmed: bool,
    before: Option<RuleSpec>,
    after: Option<RuleSpec>,
) -> LocalWrite {
    LocalWrite {
        id: audit.id,
        rule,
        at: audit.at,
        actor: audit.actor.clone(),
        is_confirmed,
        before,
        after,
    }
}

/// Puts a rule in force that was made or changed, with an event and a log line. `change`: `created` or `changed`.
pub async fn made_or_changed(
    state: &State,
    id: RuleId,
    place: Place<Rule>,
    spec: &RuleSpec,
    by: Author<'_>,
    change: &'static str,
) -> Place<Rule> {
    let is_local = match &place {
        Place::Database(rule) => {
            apply(state, Written::Rule(rule.clone())).await;
            false
        }
        Place::Journal => true,
    };
    tell(state, id, Some(spec), by, change, is_local);
    place
}

/// Who changes a rule, for the log.
#[derive(Clone, Copy, Debug)]
pub struct Author<'a> {
    pub name: &'a str,
    /// Id of the API call; empty if there was none.
    pub request: &'a str,
}

/// Publishes a change that is in force, as an event and a log line. `spec` is what the rule says, or said before its
/// deletion.
pub fn tell(state: &State, id: RuleId, spec: Option<&RuleSpec>, by: Author<'_>, change: &'static str, is_local: bool) {
    let revision = state.rules.current().revision();
    let event = Event::Rules {
        revision,
        rule: Some(id),
        change,
    };
    state.events.notice(state.clock.wall(), event);
    let field = |label: Option<&str>| label.unwrap_or("any").to_owned();
    let matches = spec.map(|spec| &spec.matches);
    tracing::info!(
        request.id = by.request,
        rule.id = %id,
        rule.firmware = field(matches.and_then(|matches| matches.firmware.as_ref()).map(Range::as_str)),
        rule.model = field(matches.and_then(|matches| matches.model.as_deref())),
        rule.tenant = field(matches.and_then(|matches| matches.tenant.as_deref())),
        rule.effect = spec.map(|spec| spec.effect.as_str()),
        rule.mode = spec.map(|spec| spec.mode.as_str()),
        rule.admit_percent = spec.map(|spec| spec.admit_percent),
        rule.evict = spec.map(|spec| spec.evict),
        rule.reason = spec.map(|spec| spec.reason.as_str()),
        rules.revision = revision,
        actor = by.name,
        change,
        is_local,
        "firmware rule written"
    );
}
