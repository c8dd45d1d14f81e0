//! Rules with a share, by the pieces of the order of versions that they cover.
//!
//! A device that one of them admits must be checked against the next, so a piece needs all of its rules. A list for
//! each piece would take the square of the number of rules. In a segment tree a rule is in a few nodes, and a piece's
//! rules are those on its way to the root.

use std::ops::Range;

use super::compiled::Rank;

/// A segment tree over pieces. Empty if no rule has a share.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    pieces: usize,
    /// The root is node 1; the leaf of a piece is at its index plus the number of pieces. Each node's rules are in
    /// order of precedence.
    nodes: Box<[Vec<Rank>]>,
}

impl Shares {
    /// `rules`: each with the pieces that it covers, in order of precedence.
    pub(super) fn of(pieces: usize, rules: &[(Rank, Range<usize>)]) -> Self {
        if rules.is_empty() {
            return Self::default();
        }
        let mut nodes = vec![Vec::new(); 2 * pieces];
        for (rank, covered) in rules {
            let (mut start, mut end) = (covered.start + pieces, covered.end + pieces);
            while start < end {
                if start % 2 == 1 {
                    nodes[start].push(*rank);
                    start += 1;
                }
                if end % 2 == 1 {
                    end -= 1;
                    nodes[end].push(*rank);
                }
                (start, end) = (start / 2, end / 2);
            }
        }
        nodes.iter_mut().for_each(Vec::shrink_to_fit);
        Self {
            pieces,
            nodes: nodes.into(),
        }
    }

    /// The lists that hold the rules of a piece, each rule once.
    pub(super) fn covering(&self, piece: usize) -> impl Iterator<Item = &[Rank]> {
        let leaf = (!self.nodes.is_empty()).then_some(piece + self.pieces);
        let path = std::iter::successors(leaf, |node| (*node > 1).then_some(node / 2));
        path.filter_map(|node| self.nodes.get(node)).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_has_the_rules_that_cover_it_once_each() {
        for pieces in 1..20 {
            let all = (0..pieces).flat_map(|start| (start + 1..=pieces).map(move |end| start..end));
            let rules: Vec<(Rank, Range<usize>)> = (0..).zip(all).collect();
            let shares = Shares::of(pieces, &rules);

            for piece in 0..pieces {
                let mut found: Vec<Rank> = shares.covering(piece).flatten().copied().collect();
                found.sort_unstable();
                let covering = rules.iter().filter(|(_, covered)| covered.contains(&piece));
                assert_eq!(
                    found,
                    covering.map(|(rank, _)| *rank).collect::<Vec<_>>(),
                    "{piece} of {pieces}"
                );
                assert!(shares.covering(piece).all(|ranks| ranks.is_sorted()));
            }
        }
    }
}
