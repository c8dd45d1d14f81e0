//! All rules of a node, compiled so that one question costs a few binary searches and no allocation.
//!
//! Read [`RuleSet`] first. Rules are sorted by precedence, so that of two rules the one with the lesser index counts. They
//! are grouped by the model and tenant that they ask for; in each group the order of versions is cut at every place where
//! the answer changes, and each piece holds its answer: per effect, the one rule that outlasts the others.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use sha2::{Digest, Sha256};

use super::{Effect, Rule, Unsupported, stored::hash_rule};
use crate::{
    firmware::{Cut, Exact, Version},
    id::Label,
    time::WallTime,
};

/// What rules ask of a device: what it says of itself, or what the registry says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject<'a> {
    /// `None`, and blank text, is a missing version.
    pub firmware: Option<&'a str>,
    pub model: Option<&'a str>,
    pub tenant: Option<&'a str>,
}

/// An owned [`Subject`]: what a device said of itself, kept while it waits for its look-up.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnedSubject {
    pub firmware: Option<Label>,
    pub model: Option<Label>,
    pub tenant: Option<Label>,
}

impl OwnedSubject {
    #[must_use]
    pub fn as_subject(&self) -> Subject<'_> {
        Subject {
            firmware: self.firmware.as_deref(),
            model: self.model.as_deref(),
            tenant: self.tenant.as_deref(),
        }
    }
}

/// An immutable set of rules at one revision.
///
/// Of several rules that match, the strictest effect counts; among rules of one effect the one that lasts longest, then the oldest,
/// then the one with the least id. Expired rules match nothing from the millisecond on that they name, without a new set.
#[derive(Clone, Debug)]
pub struct RuleSet {
    revision: u64,
    digest: [u8; 16],
    /// By precedence.
    rules: Box<[Rule]>,
    /// By id.
    unsupported: Box<[Unsupported]>,
    enforced: Groups,
    /// Only rules that close sessions too.
    evicting: Groups,
}

impl RuleSet {
    /// No rules, revision 0.
    #[must_use]
    pub fn empty() -> Self {
        Self::compile(0, Vec::new())
    }

    /// Compiles `rules`, in time n log n. Those that this version can't enforce are kept as [`unsupported`](Self::unsupported).
    #[must_use]
    pub fn compile(revision: u64, rules: Vec<Rule>) -> Self {
        Self::compile_stored(revision, rules, Vec::new())
    }

    /// Compiles what is stored: the rules of this version, and those that it can't enforce, which refuse nobody.
    #[must_use]
    pub fn compile_stored(revision: u64, rules: Vec<Rule>, mut unsupported: Vec<Unsupported>) -> Self {
        let mut enforceable = Vec::with_capacity(rules.len());
        for rule in rules {
            if rule.spec.validate().is_ok() {
                enforceable.push(rule);
            } else if let Err(found) = Rule::read(rule.id, &rule.spec_json(), rule.created_at, rule.revision) {
                unsupported.push(found);
            }
        }
        let digest = digest(&mut enforceable, &mut unsupported);
        enforceable.sort_by(precedence);
        Self {
            revision,
            digest,
            enforced: Groups::compile(&enforceable, |_| true),
            evicting: Groups::compile(&enforceable, |rule| rule.spec.evict),
            rules: enforceable.into(),
            unsupported: unsupported.into(),
        }
    }

    /// Revision of the stored rules that this set was compiled from.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Hash of what the rules say: equal on all nodes that hold the same rules, in whatever order they came. The set's revision is not part of it.
    #[must_use]
    pub const fn digest(&self) -> [u8; 16] {
        self.digest
    }

    /// [`RuleSet::digest`] in hexadecimal digits.
    #[must_use]
    pub fn digest_hex(&self) -> String {
        self.digest.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a String does not fail");
            text
        })
    }

    /// All rules that this version enforces, expired ones also, by precedence.
    #[must_use]
    pub const fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Stored rules that this version can't enforce, by id. They are kept and refuse nobody.
    #[must_use]
    pub const fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
    }

    /// The enforced rule that counts for `subject`. Takes time log n, allocates nothing.
    #[must_use]
    pub fn evaluate(&self, subject: &Subject<'_>, wall: WallTime) -> Option<&Rule> {
        self.enforced.find(&self.rules, subject, wall)
    }

    /// The same among the rules with `evict`: the one that closes a live session, even where another rule of the same effect has precedence.
    #[must_use]
    pub fn evicting(&self, subject: &Subject<'_>, wall: WallTime) -> Option<&Rule> {
        self.evicting.find(&self.rules, subject, wall)
    }

    /// Whether any rule closes live sessions now.
    #[must_use]
    pub fn is_evicting(&self, wall: WallTime) -> bool {
        self.rules.iter().any(|rule| rule.spec.evict && !rule.is_expired(wall))
    }
}

/// Strictest effect first, then the rule that lasts longest, then the oldest.
fn precedence(left: &Rule, right: &Rule) -> Ordering {
    let key = |rule: &Rule| {
        let lasts_until = rule.spec.expires_at.map_or(u64::MAX, WallTime::as_unix_ms);
        (rule.spec.effect, Reverse(lasts_until), rule.created_at, rule.id)
    };
    key(left).cmp(&key(right))
}

/// Sorts by id, so that the order in which rules came does not count.
fn digest(rules: &mut [Rule], unsupported: &mut [Unsupported]) -> [u8; 16] {
    rules.sort_by_key(|rule| rule.id);
    unsupported.sort_by_key(|rule| rule.id);
    let mut hash = Sha256::new();
    let mut unknown = unsupported.iter().peekable();
    let stored = |hash: &mut Sha256, rule: &Unsupported| {
        hash_rule(hash, rule.id, rule.created_at, rule.revision, &rule.spec);
    };
    // In the order of ids, whichever this version knows.
    for rule in rules {
        while let Some(other) = unknown.next_if(|other| other.id < rule.id) {
            stored(&mut hash, other);
        }
        hash_rule(&mut hash, rule.id, rule.created_at, rule.revision, &rule.spec_json());
    }
    unknown.for_each(|other| stored(&mut hash, other));
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.finalize()[..16]);
    digest
}

/// Index of a rule in [`RuleSet::rules`].
type Rank = u32;

// === Groups ===

/// Rules by the model and the tenant that they ask for.
#[derive(Clone, Debug, Default)]
struct Groups {
    /// Sorted by key.
    groups: Box<[(Key, Group)]>,
}

/// Model and tenant, `None` where any will do.
type Key = (Option<Box<str>>, Option<Box<str>>);

impl Groups {
    fn compile(rules: &[Rule], is_in: impl Fn(&Rule) -> bool) -> Self {
        let mut members: BTreeMap<Key, Vec<Rank>> = BTreeMap::new();
        for (rule, rank) in rules.iter().zip(0..) {
            if is_in(rule) {
                let wanted = &rule.spec.matches;
                let owned = |label: &Option<crate::id::Label>| label.as_ref().map(|label| Box::from(label.as_str()));
                members
                    .entry((owned(&wanted.model), owned(&wanted.tenant)))
                    .or_default()
                    .push(rank);
            }
        }
        let groups = members
            .into_iter()
            .map(|(key, ranks)| (key, Group::compile(rules, &ranks)));
        Self {
            groups: groups.collect(),
        }
    }

    fn find<'r>(&self, rules: &'r [Rule], subject: &Subject<'_>, wall: WallTime) -> Option<&'r Rule> {
        if self.groups.is_empty() {
            return None;
        }
        let firmware = subject.firmware.map_or("", str::trim);
        let version = Version::of(firmware);
        let any_model = std::iter::once(None).chain(subject.model.map(Some));
        let keys = any_model
            .flat_map(|model| std::iter::once((model, None)).chain(subject.tenant.map(|tenant| (model, Some(tenant)))));
        keys.filter_map(|key| self.group(key))
            .filter_map(|group| group.find(rules, firmware, version, wall))
            .min()
            .and_then(|rank| rules.get(rank as usize))
    }

    fn group(&self, wanted: (Option<&str>, Option<&str>)) -> Option<&Group> {
        let at = self
            .groups
            .binary_search_by(|((model, tenant), _)| (model.as_deref(), tenant.as_deref()).cmp(&wanted));
        at.ok().and_then(|at| self.groups.get(at)).map(|(_, group)| group)
    }
}

// === Group ===

/// The answers of the rules that ask for the same model and tenant.
#[derive(Clone, Debug)]
struct Group {
    /// Rules that do not ask for a version.
    always: Answer,
    /// Sorted, each once. `pieces[i]` stands behind `i` of them, so that there is one piece more.
    cuts: Box<[Cut]>,
    pieces: Box<[Answer]>,
    /// Versions without a digit, in lower case, sorted.
    texts: Box<[(Box<str>, Answer)]>,
    missing: Answer,
}

impl Group {
    fn compile(rules: &[Rule], ranks: &[Rank]) -> Self {
        let mut always = BTreeSet::new();
        let mut missing = BTreeSet::new();
        let mut texts: BTreeMap<Box<str>, BTreeSet<Rank>> = BTreeMap::new();
        let mut spans = Vec::new();
        for &rank in ranks {
            match &rules[rank as usize].spec.matches.firmware {
                None => {
                    always.insert(rank);
                }
                Some(range) => {
                    spans.extend(range.spans().iter().map(|span| (rank, span)));
                    match range.exact() {
                        None => {}
                        Some(Exact::Missing) => {
                            missing.insert(rank);
                        }
                        Some(Exact::Text(text)) => {
                            texts.entry(lower_case(text)).or_default().insert(rank);
                        }
                    }
                }
            }
        }
        let (cuts, pieces) = sweep(rules, &spans);
        Self {
            always: Answer::of(rules, &always),
            cuts,
            pieces,
            texts: texts
                .into_iter()
                .map(|(text, ranks)| (text, Answer::of(rules, &ranks)))
                .collect(),
            missing: Answer::of(rules, &missing),
        }
    }

    /// `firmware` is trimmed; empty means missing. `version` is the same, taken apart.
    fn find(&self, rules: &[Rule], firmware: &str, version: Version<'_>, wall: WallTime) -> Option<Rank> {
        let special = match version.numbered() {
            Some(version) => {
                let behind = self.cuts.partition_point(|cut| cut.is_reached(&version));
                self.pieces.get(behind).and_then(|answer| answer.at(rules, wall))
            }
            None => {
                let missing = Exact::Missing
                    .is(firmware)
                    .then(|| self.missing.at(rules, wall))
                    .flatten();
                let text = self.text(version).and_then(|answer| answer.at(rules, wall));
                missing.into_iter().chain(text).min()
            }
        };
        special.into_iter().chain(self.always.at(rules, wall)).min()
    }

    fn text(&self, version: Version<'_>) -> Option<&Answer> {
        let stated = version.text()?;
        let at = self
            .texts
            .binary_search_by(|(text, _)| Version::of_text(text).cmp(&Version::of_text(stated)));
        at.ok().and_then(|at| self.texts.get(at)).map(|(_, answer)| answer)
    }
}

fn lower_case(text: &str) -> Box<str> {
    text.chars().flat_map(char::to_lowercase).collect()
}

/// Cuts the order at the ends of all spans, and answers for each piece.
fn sweep(rules: &[Rule], spans: &[(Rank, &crate::firmware::Span)]) -> (Box<[Cut]>, Box<[Answer]>) {
    let mut cuts: Vec<&Cut> = spans
        .iter()
        .flat_map(|(_, span)| span.start.iter().chain(&span.end))
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let behind = |cut: &Cut| cuts.partition_point(|other| *other <= cut);
    // What begins and what ends at each piece.
    let mut begins: Vec<Vec<Rank>> = vec![Vec::new(); cuts.len() + 1];
    let mut ends: Vec<Vec<Rank>> = begins.clone();
    for (rank, span) in spans {
        begins[span.start.as_ref().map_or(0, behind)].push(*rank);
        if let Some(end) = &span.end {
            ends[behind(end)].push(*rank);
        }
    }
    let mut current = BTreeSet::new();
    let pieces = begins.iter().zip(&ends).map(|(begins, ends)| {
        // A rule's spans never overlap, but one may begin where another ends.
        ends.iter().for_each(|rank| {
            current.remove(rank);
        });
        current.extend(begins);
        Answer::of(rules, &current)
    });
    let pieces = pieces.collect();
    (cuts.into_iter().cloned().collect(), pieces)
}

// === Answer ===

/// Per effect the rule that lasts longest, strictest first: when it has expired, so have all others of its effect.
#[derive(Clone, Copy, Debug)]
struct Answer {
    ranks: [Rank; 3],
}

impl Answer {
    const NONE: Rank = Rank::MAX;

    /// Looks at each effect's first rule only: `ranks` are in order of precedence.
    fn of(rules: &[Rule], ranks: &BTreeSet<Rank>) -> Self {
        let first_of = |effect: Effect| {
            let start = rules.partition_point(|rule| rule.spec.effect < effect);
            let end = rules.partition_point(|rule| rule.spec.effect <= effect);
            let (start, end) = (Rank::try_from(start), Rank::try_from(end));
            match (start, end) {
                (Ok(start), Ok(end)) => ranks.range(start..end).next().copied().unwrap_or(Self::NONE),
                _ => Self::NONE,
            }
        };
        Self {
            ranks: [Effect::Block, Effect::Restrict, Effect::Throttle].map(first_of),
        }
    }

    fn at(&self, rules: &[Rule], wall: WallTime) -> Option<Rank> {
        let lives = |rank: &&Rank| rules.get(**rank as usize).is_some_and(|rule| !rule.is_expired(wall));
        self.ranks.iter().find(lives).copied()
    }
}
