//! All rules of a node, compiled so that an evaluation costs a few binary searches and no allocation.
//!
//! Read [`RuleSet`] first. Rules are sorted by precedence, so that of two rules the one with the lower index applies.
//! They are grouped by the model and tenant that they name. In each group the order of versions is cut at every place
//! where the result changes. Each piece holds its result: per effect, the one rule that outlasts the others. Rules with
//! a share are kept beside it, because a device that one of them admits must be checked against the next.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
};

use serde_json::value::to_raw_value;

use super::{Effect, Mode, Rule, Ruling, Subject, Unsupported, Verdict, digest::digest, shares::Shares};
use crate::{
    firmware::{Cut, Exact, Span, Version},
    frame::ServerFrame,
    id::{DeviceId, Label, RuleId},
    slots::TenantTag,
    time::WallTime,
};

/// An immutable set of rules at one revision.
///
/// Of several rules that match, the one with the strictest effect applies. Among rules of one effect it is the one that
/// lasts longest, then the oldest, then the one with the lowest id. A rule does not match the devices in its share. It
/// matches nothing from the millisecond of its expiry, without a new set.
#[derive(Clone, Debug)]
pub struct RuleSet {
    revision: u64,
    digest: [u8; 16],
    /// By precedence.
    rules: Box<[Rule]>,
    /// Sorted.
    by_id: Box<[(RuleId, Rank)]>,
    /// The update frame of each rule that restricts, made once for all of its devices.
    update_frames: BTreeMap<RuleId, Arc<str>>,
    /// By id.
    unsupported: Box<[Unsupported]>,
    enforced: Groups,
    /// The enforced rules that also close sessions.
    evicting: Groups,
    dry_run: Groups,
    /// The tenants that rules name.
    tenants: BTreeMap<TenantTag, Label>,
}

impl RuleSet {
    /// No rules, revision 0.
    #[must_use]
    pub fn empty() -> Self {
        Self::compile(0, Vec::new())
    }

    /// Compiles `rules`, in time n log n. Those that this version cannot enforce are kept as
    /// [`unsupported`](Self::unsupported).
    #[must_use]
    pub fn compile(revision: u64, rules: Vec<Rule>) -> Self {
        Self::compile_stored(revision, rules, Vec::new())
    }

    /// Compiles stored rules: those of this version, and those that it cannot enforce, which refuse no device.
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
        Self::compile_all(revision, enforceable, unsupported)
    }

    fn compile_all(revision: u64, mut rules: Vec<Rule>, mut unsupported: Vec<Unsupported>) -> Self {
        unsupported.sort_by_key(|rule| rule.id);
        rules.sort_by(precedence);
        let is_enforced = |rule: &Rule| rule.spec.mode == Mode::Enforce;
        let mut by_id: Box<[_]> = rules.iter().map(|rule| rule.id).zip(0..).collect();
        by_id.sort_unstable();
        let tenants = rules.iter().filter_map(|rule| rule.spec.matches.tenant.clone());
        let restricting = rules.iter().filter(|rule| rule.spec.effect == Effect::Restrict);
        Self {
            revision,
            by_id,
            update_frames: restricting.map(|rule| (rule.id, update_frame(rule))).collect(),
            digest: digest(&rules, &unsupported),
            enforced: Groups::compile(&rules, is_enforced),
            evicting: Groups::compile(&rules, |rule| is_enforced(rule) && rule.spec.evict),
            dry_run: Groups::compile(&rules, |rule| !is_enforced(rule)),
            tenants: tenants.map(|tenant| (TenantTag::of(tenant.as_str()), tenant)).collect(),
            rules: rules.into(),
            unsupported: unsupported.into(),
        }
    }

    /// Revision of the stored rules that this set was compiled from.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Hash of the rules' content: equal on all nodes that hold the same rules. Revisions are not part of it.
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

    /// All rules that this version enforces, expired ones included, by precedence.
    #[must_use]
    pub const fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rule with this id, if this version enforces it. Takes time log n.
    #[must_use]
    pub fn get(&self, id: RuleId) -> Option<&Rule> {
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, rank) = self.by_id.get(at)?;
        self.rules.get(*rank as usize)
    }

    /// Whether any rule names a tenant.
    #[must_use]
    pub fn name_tenants(&self) -> bool {
        !self.tenants.is_empty()
    }

    /// The tenant with this tag as rules name it. Empty if none does: no rule on tenants matches it.
    #[must_use]
    pub fn tenant_of(&self, tag: TenantTag) -> &str {
        self.tenants.get(&tag).map_or("", Label::as_str)
    }

    /// The `update` frame of a rule that restricts, as text.
    pub(crate) fn update_frame(&self, rule: &Rule) -> Arc<str> {
        let made = self.update_frames.get(&rule.id);
        made.map_or_else(|| update_frame(rule), Arc::clone)
    }

    /// Stored rules that this version cannot enforce, by id. They are kept and refuse no device.
    #[must_use]
    pub const fn unsupported(&self) -> &[Unsupported] {
        &self.unsupported
    }

    /// The rules that apply to `subject`. Takes time log n, unless many rules with a share admit it, and allocates
    /// nothing.
    #[must_use]
    pub fn verdict(&self, subject: &Subject<'_>, wall: WallTime) -> Verdict<'_> {
        let ruling = |groups: &Groups| groups.find(&self.rules, subject, wall).map(Ruling::of);
        Verdict {
            enforced: ruling(&self.enforced),
            dry_run: ruling(&self.dry_run),
        }
    }

    /// The rule that closes a live session: the one that applies among those with `evict`, even if another rule has
    /// precedence.
    #[must_use]
    pub fn evicting(&self, subject: &Subject<'_>, wall: WallTime) -> Option<&Rule> {
        self.evicting.find(&self.rules, subject, wall)
    }

    /// Whether any rule closes live sessions now.
    #[must_use]
    pub fn is_evicting(&self, wall: WallTime) -> bool {
        let is_evicting = |rule: &Rule| rule.spec.evict && rule.spec.mode == Mode::Enforce && !rule.is_expired(wall);
        self.rules.iter().any(is_evicting)
    }
}

/// The same rules at the same revision.
impl PartialEq for RuleSet {
    fn eq(&self, other: &Self) -> bool {
        (self.revision, &self.rules, &self.unsupported) == (other.revision, &other.rules, &other.unsupported)
    }
}

fn update_frame(rule: &Rule) -> Arc<str> {
    let update = to_raw_value(&rule.spec.update).expect("a map of JSON values has a JSON form");
    let frame = ServerFrame::Update {
        rule: rule.id,
        update: &update,
    };
    frame.to_json().into()
}

/// Strictest effect first, then the rule that lasts longest, then the oldest.
fn precedence(left: &Rule, right: &Rule) -> Ordering {
    let key = |rule: &Rule| {
        let lasts_until = rule.spec.expires_at.map_or(u64::MAX, WallTime::as_unix_ms);
        (rule.spec.effect, Reverse(lasts_until), rule.created_at, rule.id)
    };
    key(left).cmp(&key(right))
}

/// Index of a rule in [`RuleSet::rules`].
pub(super) type Rank = u32;
/// Marks the absence of a rule.
const NONE: Rank = Rank::MAX;

/// Input of an evaluation.
struct Question<'a> {
    rules: &'a [Rule],
    device: Option<DeviceId>,
    /// Trimmed; empty means missing.
    firmware: &'a str,
    /// `firmware`, parsed.
    version: Version<'a>,
    wall: WallTime,
}

impl Question<'_> {
    /// Lowest rank of a rule without a share that has not expired.
    fn whole(&self, answer: &Whole) -> Rank {
        let lives = |rank: &&Rank| {
            self.rules
                .get(**rank as usize)
                .is_some_and(|rule| !rule.is_expired(self.wall))
        };
        answer.ranks.iter().find(lives).copied().unwrap_or(NONE)
    }

    /// The lowest of `best` and the ranks in `shared` of rules that have not expired and do not admit the device.
    fn shared(&self, shared: &[Rank], best: Rank) -> Rank {
        let counts = |rank: &&Rank| {
            let rule = self.rules.get(**rank as usize);
            rule.is_some_and(|rule| {
                !rule.is_expired(self.wall) && !self.device.is_some_and(|device| rule.admits(device))
            })
        };
        let lesser = shared.iter().take_while(|rank| **rank < best);
        lesser.clone().find(counts).copied().unwrap_or(best)
    }

    fn answer(&self, answer: &Answer) -> Rank {
        self.shared(&answer.shared, self.whole(&answer.whole))
    }
}

// === Groups ===

/// Rules by the model and the tenant that they name.
#[derive(Clone, Debug, Default)]
struct Groups {
    /// Sorted by key.
    groups: Box<[(Key, Group)]>,
}

/// Model and tenant; `None` matches any.
type Key = (Option<Box<str>>, Option<Box<str>>);

impl Groups {
    fn compile(rules: &[Rule], is_in: impl Fn(&Rule) -> bool) -> Self {
        let mut members: BTreeMap<Key, Vec<Rank>> = BTreeMap::new();
        for (rule, rank) in rules.iter().zip(0..) {
            // A rule that admits every device has no effect.
            if is_in(rule) && rule.spec.admit_percent < 100 {
                let wanted = &rule.spec.matches;
                let owned = |label: &Option<Label>| label.as_ref().map(|label| Box::from(label.as_str()));
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
        let question = Question {
            rules,
            device: subject.device,
            firmware,
            version: Version::of(firmware),
            wall,
        };
        let any_model = std::iter::once(None).chain(subject.model.map(Some));
        let keys = any_model
            .flat_map(|model| std::iter::once((model, None)).chain(subject.tenant.map(|tenant| (model, Some(tenant)))));
        let groups = keys.filter_map(|key| self.group(key));
        let rank = groups.fold(NONE, |best, group| group.find(&question, best));
        rules.get(rank as usize)
    }

    fn group(&self, wanted: (Option<&str>, Option<&str>)) -> Option<&Group> {
        let at = self
            .groups
            .binary_search_by(|((model, tenant), _)| (model.as_deref(), tenant.as_deref()).cmp(&wanted));
        at.ok().and_then(|at| self.groups.get(at)).map(|(_, group)| group)
    }
}

// === Group ===

/// The results of the rules that name the same model and tenant.
#[derive(Clone, Debug)]
struct Group {
    /// Rules that do not name a version.
    always: Answer,
    /// Sorted and distinct. `pieces[i]` is after `i` of them, so there is one more piece than cuts.
    cuts: Box<[Cut]>,
    pieces: Box<[Whole]>,
    /// The rules with a share, by piece.
    shares: Shares,
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
        let (cuts, pieces, shares) = sweep(rules, &spans);
        Self {
            always: Answer::of(rules, &always),
            cuts,
            pieces,
            shares,
            texts: texts
                .into_iter()
                .map(|(text, ranks)| (text, Answer::of(rules, &ranks)))
                .collect(),
            missing: Answer::of(rules, &missing),
        }
    }

    /// The lowest of `best` and the rank of the rule that applies here.
    fn find(&self, question: &Question<'_>, best: Rank) -> Rank {
        let best = best.min(question.answer(&self.always));
        match question.version.numbered() {
            Some(version) => {
                let piece = self.cuts.partition_point(|cut| cut.is_reached(&version));
                let whole = self.pieces.get(piece).map_or(NONE, |whole| question.whole(whole));
                let shared = self.shares.covering(piece);
                shared.fold(best.min(whole), |best, ranks| question.shared(ranks, best))
            }
            None => {
                let missing = Exact::Missing.is(question.firmware).then_some(&self.missing);
                let text = self.text(question.version);
                missing
                    .into_iter()
                    .chain(text)
                    .fold(best, |best, answer| best.min(question.answer(answer)))
            }
        }
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

/// Cuts the order at the ends of all spans, and computes the result of each piece.
fn sweep(rules: &[Rule], spans: &[(Rank, &Span)]) -> (Box<[Cut]>, Box<[Whole]>, Shares) {
    let mut cuts: Vec<&Cut> = spans
        .iter()
        .flat_map(|(_, span)| span.start.iter().chain(&span.end))
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let behind = |cut: &Cut| cuts.partition_point(|other| *other <= cut);
    let covered = spans.iter().map(|(rank, span)| {
        let start = span.start.as_ref().map_or(0, behind);
        (*rank, start..span.end.as_ref().map_or(cuts.len() + 1, behind))
    });
    let (shared, whole): (Vec<_>, Vec<_>) = covered.partition(|(rank, _)| has_share(rules, *rank));
    // The rules that begin and end at each piece, and after the last one.
    let mut begins: Vec<Vec<Rank>> = vec![Vec::new(); cuts.len() + 2];
    let mut ends: Vec<Vec<Rank>> = begins.clone();
    for (rank, covered) in whole {
        begins[covered.start].push(rank);
        ends[covered.end].push(rank);
    }
    let mut current = BTreeSet::new();
    let pieces = begins.iter().zip(&ends).take(cuts.len() + 1).map(|(begins, ends)| {
        // The spans of a rule never overlap, but one may begin where another ends.
        ends.iter().for_each(|rank| {
            current.remove(rank);
        });
        current.extend(begins);
        Whole::of(rules, &current)
    });
    let pieces = pieces.collect();
    let shares = Shares::of(cuts.len() + 1, &shared);
    (cuts.into_iter().cloned().collect(), pieces, shares)
}

/// Whether the rule admits some devices, by its share or by its list.
fn has_share(rules: &[Rule], rank: Rank) -> bool {
    rules.get(rank as usize).is_some_and(|rule| rule.spec.is_partial())
}

// === Answer ===

/// The result of rules that match the same versions.
#[derive(Clone, Debug)]
struct Answer {
    whole: Whole,
    /// Rules with a share or a list of allowed devices, by precedence.
    shared: Box<[Rank]>,
}

impl Answer {
    fn of(rules: &[Rule], ranks: &BTreeSet<Rank>) -> Self {
        let (shared, whole): (BTreeSet<Rank>, BTreeSet<Rank>) = ranks.iter().partition(|rank| has_share(rules, **rank));
        Self {
            whole: Whole::of(rules, &whole),
            shared: shared.into_iter().collect(),
        }
    }
}

/// Of rules without a share: per effect the one that lasts longest, strictest first. When it has expired, all others of
/// its effect have as well.
#[derive(Clone, Copy, Debug)]
struct Whole {
    ranks: [Rank; 3],
}

impl Whole {
    /// Reads only the first rule of each effect: `ranks` are in order of precedence.
    fn of(rules: &[Rule], ranks: &BTreeSet<Rank>) -> Self {
        let first_of = |effect: Effect| {
            let start = rules.partition_point(|rule| rule.spec.effect < effect);
            let end = rules.partition_point(|rule| rule.spec.effect <= effect);
            let (start, end) = (Rank::try_from(start), Rank::try_from(end));
            match (start, end) {
                (Ok(start), Ok(end)) => ranks.range(start..end).next().copied().unwrap_or(NONE),
                _ => NONE,
            }
        };
        Self {
            ranks: [Effect::Block, Effect::Restrict, Effect::Throttle].map(first_of),
        }
    }
}
