//! What each rule did on this node: attempts refused, sessions evicted.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use seawall_proto::{id::RuleId, rules::RuleSet};

/// Maximum number of rules with metric series of their own: those made last.
const SERIES_MAX: usize = 50;

/// What a rule did on this node since it came into force here, or since the start.
#[derive(Debug, Default)]
pub struct Hits {
    refused: AtomicU64,
    evicted: AtomicU64,
}

impl Hits {
    /// Connect attempts that it refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Sessions that it closed.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

/// Counters of the rules in force. Counting takes no lock and allocates nothing.
#[derive(Debug, Default)]
pub struct HitsByRule(HashMap<RuleId, Arc<Hits>>);

impl HitsByRule {
    /// What the rule did; `None` where it is not in force.
    #[must_use]
    pub fn of(&self, rule: RuleId) -> Option<&Hits> {
        self.0.get(&rule).map(Arc::as_ref)
    }

    /// Counters for the rules of `set`. Those of rules that were in force before go on.
    pub(super) fn carried_to(&self, set: &RuleSet) -> Self {
        let hits = set.rules().iter().map(|rule| {
            let hits = self.0.get(&rule.id).cloned().unwrap_or_default();
            (rule.id, hits)
        });
        Self(hits.collect())
    }

    pub(super) fn count_refused(&self, rule: RuleId) {
        if let Some(hits) = self.of(rule) {
            hits.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count_evicted(&self, rule: RuleId) {
        if let Some(hits) = self.of(rule) {
            hits.evicted.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The series of `/metrics` about these rules.
    #[must_use]
    pub fn render(&self) -> String {
        let mut rules: Vec<(&RuleId, &Arc<Hits>)> = self.0.iter().collect();
        // Ids begin with the time at which their rules were made.
        rules.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(**id));
        rules.truncate(SERIES_MAX);
        let mut text = String::from(
            "# HELP seawall_rule_hits_total What a firmware rule did on this node, by rule and outcome.\n\
             # TYPE seawall_rule_hits_total counter\n",
        );
        for (id, hits) in rules {
            for (outcome, figure) in [("refused", hits.refused()), ("evicted", hits.evicted())] {
                let written = writeln!(
                    text,
                    "seawall_rule_hits_total{{rule=\"{id}\",outcome=\"{outcome}\"}} {figure}"
                );
                debug_assert!(written.is_ok(), "writing to a string does not fail");
            }
        }
        text.push('\n');
        text
    }
}
