//! Effects of each rule on this node, also in dry-run mode: attempts refused, sessions evicted.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use seawall_proto::{id::RuleId, rules::RuleSet};

/// Maximum number of rules with their own metric series: the newest ones.
const SERIES_MAX: usize = 50;

seawall_proto::labels! {
    /// Effect of a rule, real or in dry-run mode. Label `outcome` of `seawall_rule_hits_total`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Hit {
        /// A connect attempt was refused with `firmware_blocked`.
        Refused = "refused",
        /// A device had a restricted session.
        Restricted = "restricted",
        /// A connect attempt was refused with `throttled`.
        Throttled = "throttled",
        /// A session was closed.
        Evicted = "evicted",
        /// It would have applied to a connect attempt, in dry-run mode.
        DryRun = "dry_run",
    }
}

/// Effects of a rule on this node since it came into force here, or since the start.
#[derive(Debug, Default)]
pub struct Hits([AtomicU64; Hit::ALL.len()]);

impl Hits {
    #[must_use]
    pub fn get(&self, hit: Hit) -> u64 {
        self.counter(hit).load(Ordering::Relaxed)
    }

    fn counter(&self, hit: Hit) -> &AtomicU64 {
        &self.0[hit as usize]
    }
}

/// Counters of the rules in force. Counting takes no lock and allocates nothing.
#[derive(Debug, Default)]
pub struct HitsByRule(HashMap<RuleId, Arc<Hits>>);

impl HitsByRule {
    /// Effects of the rule; `None` if it is not in force.
    #[must_use]
    pub fn of(&self, rule: RuleId) -> Option<&Hits> {
        self.0.get(&rule).map(Arc::as_ref)
    }

    /// Counters for the rules of `set`. Counters of rules that were already in force continue.
    pub(super) fn carried_to(&self, set: &RuleSet) -> Self {
        let hits = set.rules().iter().map(|rule| {
            let hits = self.0.get(&rule.id).cloned().unwrap_or_default();
            (rule.id, hits)
        });
        Self(hits.collect())
    }

    /// Counts an effect. Returns its number so far; `None` if the rule is not in force.
    pub(super) fn count(&self, rule: RuleId, hit: Hit) -> Option<u64> {
        let hits = self.of(rule)?;
        Some(hits.counter(hit).fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The series of `/metrics` about these rules.
    #[must_use]
    pub fn render(&self) -> String {
        let mut rules: Vec<(&RuleId, &Arc<Hits>)> = self.0.iter().collect();
        // Ids begin with the time of creation of their rules.
        rules.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(**id));
        rules.truncate(SERIES_MAX);
        let mut text = String::from(
            "# HELP seawall_rule_hits_total What a firmware rule did on this node, by rule and outcome.\n\
             # TYPE seawall_rule_hits_total counter\n",
        );
        for (id, hits) in rules {
            for hit in Hit::ALL {
                let (outcome, figure) = (hit.as_str(), hits.get(hit));
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
