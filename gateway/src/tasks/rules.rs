//! Polls the rules, keeps them on disk, and raises alarms about rules that are stored but not enforced, or enforced but
//! not stored. Start with [`follow`].

use std::sync::Arc;

use seawall_proto::rules::RuleSet;

use tokio_util::sync::CancellationToken;

use crate::{
    fleet::rules::{LOST_ALARM, UNSUPPORTED_ALARM},
    node::{Shared, State},
};

/// Raises alarms about rules that this version cannot enforce, and about rules or deletions that the database has lost.
fn set_alarms(state: &State, rules: &RuleSet) {
    let unsupported = rules.unsupported();
    let detail = unsupported.first().map_or_else(
        || "every stored rule is enforced again".to_owned(),
        |first| {
            format!(
                "{} stored rules are NOT enforced by this node, because its version cannot: for example {} ({}). Upgrade the node to the version that wrote them, or delete them: seawall rules list",
                unsupported.len(),
                first.id,
                first.problem
            )
        },
    );
    state.alarms.set(UNSUPPORTED_ALARM, !unsupported.is_empty(), detail);
    let (lost, returned) = (state.rules.lost(), state.rules.returned());
    let mut details = Vec::new();
    if let Some(first) = lost.first().map(|lost| lost.rule.id) {
        details.push(format!(
            "the database has lost {} rules that this node knows, or their rows became unreadable: for example {first}. They stay in force on the nodes that know them. Create the correct ones again, then remove the lost ones: seawall rules list, seawall rules unblock {first}",
            lost.len(),
        ));
    }
    if let Some(first) = returned.first().map(|rule| rule.id) {
        details.push(format!(
            "The database is older than this node: {} rules are in it that were not in force, most likely because they were deleted. They refuse devices here, but close no session. Delete them again, for example {first} (seawall rules unblock {first}), or change them to keep them",
            returned.len(),
        ));
    }
    let is_raised = !details.is_empty();
    if !is_raised {
        details.push("every rule in force is in the database".to_owned());
    }
    state.alarms.set(LOST_ALARM, is_raised, details.join(". "));
}

/// Polls the revision, and keeps the rules in force on disk, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let (mut is_failing, mut is_unkept) = (false, false);
    let mut kept: Option<Arc<RuleSet>> = None;
    let mut changes = state.rules.subscribe();
    loop {
        let outcome = state.rules.poll(&state.store, &state.clock, &state.events).await;
        match (&outcome, is_failing) {
            (Err(error), false) => {
                tracing::warn!(%error, "rules not readable: those in force stay");
            }
            (Ok(()), true) => tracing::info!("rules readable again"),
            (Ok(()), false) | (Err(_), true) => {}
        }
        is_failing = outcome.is_err();
        let next_poll = tokio::time::sleep(state.config.rules.poll());
        tokio::pin!(next_poll);
        loop {
            changes.borrow_and_update();
            let current = state.rules.current();
            set_alarms(&state, &current);
            // Rules that came from the disk need not be written.
            let stored = state.rules.stored();
            let is_kept = kept.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, &stored));
            if state.rules.is_confirmed() && !is_kept {
                match state.rules.keep().await {
                    Ok(on_disk) => {
                        kept = Some(on_disk);
                        is_unkept = false;
                    }
                    Err(error) => {
                        if !is_unkept {
                            tracing::error!(%error, "rules are in force but could not be written to disk: free space or repair the data directory. A restart without the database would use older rules");
                        }
                        is_unkept = true;
                    }
                }
            }
            tokio::select! {
                biased;
                changed = changes.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
                () = &mut next_poll => break,
            }
        }
    }
}
