//! Access tokens of the API: the admin token in the data directory, and a copy of the tokens in the database.
//!
//! A request never waits for the database. The admin token is checked against `admin.token`. The others are checked
//! against a copy in memory, which is also in `tokens.json` (hashes only), so that it outlives both database and
//! process. Start with [`Tokens`].

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::id::SecretHash;
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

mod files;

pub use self::files::random_secret;
use self::files::{make_admin_token, read_admin_token, read_copy, warn_if_open_to_others, write_copy};
use crate::{
    runtime::lifecycle::blocking,
    store::{Role, Store, StoreError, TokenRow},
};

/// File with the admin token, in the data directory, mode 0600.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// The admin token's name in the audit log. No other token may have it.
pub const ADMIN_TOKEN_NAME: &str = "admin.token";
/// Copy of the tokens, in the data directory, mode 0600, hashes only.
const COPY_FILE: &str = "tokens.json";
/// Maximum number of revoked tokens that are remembered.
const REVOKED_MAX: usize = 2_000;
/// Time between two reads of `admin.token`.
const ADMIN_TOKEN_TRUSTED: Duration = Duration::from_secs(1);
/// Time between two reads of the tokens from the database. A token that another node has revoked is valid here until
/// then.
const POLL: Duration = Duration::from_secs(5);

/// The owner of a request's token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The token's name, as the audit log has it.
    pub name: Arc<str>,
    pub role: Role,
}

/// All tokens in force. Clones share one copy.
#[derive(Clone, Debug)]
pub struct Tokens {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    data_dir: PathBuf,
    /// The admin token, as of the last read. `None`: the file is missing, or holds no token.
    admin: Mutex<Option<SecretHash>>,
    issued: Mutex<Issued>,
    /// Held while `tokens.json` is written, so that an older copy never replaces a newer one.
    file: Mutex<()>,
    /// Notified of every change of the valid tokens.
    changes: watch::Sender<()>,
}

/// The tokens of the database, as the copy has them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Kept {
    /// Valid ones.
    tokens: Vec<Token>,
    /// Ids of revoked tokens, the newest last, at most [`REVOKED_MAX`]. A database out of a backup may have them as
    /// valid.
    revoked: Vec<Uuid>,
}

impl Kept {
    /// Returns the new copy for these rows of the database. A token that was revoked stays so.
    fn next(&self, rows: &[TokenRow]) -> Self {
        let mut revoked = self.revoked.clone();
        let mut known: BTreeSet<Uuid> = revoked.iter().copied().collect();
        // The newest come first.
        let rows_revoked = rows.iter().rev().filter(|row| row.revoked_at.is_some());
        revoked.extend(rows_revoked.map(|row| row.id).filter(|id| known.insert(*id)));
        revoked.drain(..revoked.len().saturating_sub(REVOKED_MAX));
        let valid = rows
            .iter()
            .filter(|row| row.revoked_at.is_none() && !known.contains(&row.id));
        Self {
            tokens: valid.filter_map(Token::of).collect(),
            revoked,
        }
    }
}

#[derive(Debug, Default)]
struct Issued {
    kept: Kept,
    /// Number of local changes, so that an earlier read of the database never undoes one.
    generation: u64,
}

/// A token of the database.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    id: Uuid,
    name: Arc<str>,
    role: Role,
    hash: SecretHash,
}

/// Why the tokens can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    #[error("the admin token {} can't be read or created: {source}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
    #[error("the admin token {} is not complete: delete the file; the next start creates a new one", path.display())]
    Damaged { path: PathBuf },
}

impl Tokens {
    /// Reads the tokens of a data directory. Creates the admin token if there is none.
    ///
    /// # Errors
    /// `admin.token` can't be read or created, or holds no token. An unusable `tokens.json` is only a warning, since
    /// the database has all tokens.
    pub fn open(data_dir: &Path) -> Result<Self, TokensError> {
        let path = data_dir.join(ADMIN_TOKEN_FILE);
        let unusable = |source| TokensError::Unusable {
            path: path.clone(),
            source,
        };
        match make_admin_token(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "admin token created"),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => warn_if_open_to_others(&path),
            Err(error) => return Err(unusable(error)),
        }
        let hash = read_admin_token(&path).map_err(unusable)?;
        if hash.is_none() {
            return Err(TokensError::Damaged { path });
        }
        let kept = read_copy(&data_dir.join(COPY_FILE)).unwrap_or_else(|error| {
            tracing::warn!(error = %error, "copy of the tokens not readable: only the admin token is valid until the database answers");
            Kept::default()
        });
        Ok(Self {
            inner: Arc::new(Inner {
                data_dir: data_dir.to_owned(),
                admin: Mutex::new(hash),
                issued: Mutex::new(Issued { kept, generation: 0 }),
                file: Mutex::default(),
                changes: watch::Sender::new(()),
            }),
        })
    }

    /// Returns the owner of a token. Takes equally long for a valid and an invalid token.
    #[must_use]
    pub fn authenticate(&self, presented: &str) -> Option<Principal> {
        self.principal(&SecretHash::of(presented.as_bytes()))
    }

    /// Returns the owner of the token with this hash. Takes equally long for a valid and an invalid one.
    #[must_use]
    pub fn principal(&self, presented: &SecretHash) -> Option<Principal> {
        let is_admin = self
            .admin_hash()
            .is_some_and(|hash| bool::from(hash.as_bytes().ct_eq(presented.as_bytes())));
        let mut found = is_admin.then(|| Principal {
            name: ADMIN_TOKEN_NAME.into(),
            role: Role::Admin,
        });
        for token in &self.issued().kept.tokens {
            if bool::from(token.hash.as_bytes().ct_eq(presented.as_bytes())) {
                found = Some(Principal {
                    name: Arc::clone(&token.name),
                    role: token.role,
                });
            }
        }
        found
    }

    /// Returns a receiver that is notified when the valid tokens may have changed. Long calls then check their token
    /// again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.changes.subscribe()
    }

    /// Number of valid tokens, without the admin token.
    #[must_use]
    pub fn len(&self) -> usize {
        self.issued().kept.tokens.len()
    }

    /// Whether there is no token but the admin token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a token that was just created, and writes the copy.
    pub async fn insert(&self, row: &TokenRow) {
        self.alter(|kept| {
            kept.tokens.retain(|token| token.id != row.id);
            kept.tokens.extend(Token::of(row));
        });
        self.save().await;
    }

    /// Removes a token that was just revoked, and writes the copy.
    pub async fn remove(&self, id: Uuid) {
        self.alter(|kept| {
            kept.tokens.retain(|token| token.id != id);
            if !kept.revoked.contains(&id) {
                kept.revoked.push(id);
            }
        });
        self.save().await;
    }

    /// Reads `admin.token` every second, and the tokens from the database every few seconds, until stopped. While the
    /// database is unavailable, the copy stays valid.
    pub async fn follow(self, store: Store, stop: CancellationToken) {
        tokio::join!(self.follow_file(stop.clone()), self.follow_database(&store, stop));
    }

    async fn follow_file(&self, stop: CancellationToken) {
        let pause = || tokio::time::sleep(ADMIN_TOKEN_TRUSTED);
        let mut was_read = true;
        while stop.run_until_cancelled(pause()).await.is_some() {
            match self.reread_admin_token().await {
                Ok(()) => was_read = true,
                Err(error) => {
                    if was_read {
                        tracing::warn!(error = %error, "admin.token not readable: the previous admin token stays valid");
                    }
                    was_read = false;
                }
            }
        }
    }

    async fn follow_database(&self, store: &Store, stop: CancellationToken) {
        let mut was_read = true;
        loop {
            match self.refresh(store).await {
                Ok(()) => was_read = true,
                Err(error) => {
                    if was_read {
                        tracing::warn!(error = %error, "tokens not read from the database: the copy stays valid");
                    }
                    was_read = false;
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(POLL)).await.is_none() {
                return;
            }
        }
    }

    /// Replaces the tokens with those of the database.
    ///
    /// # Errors
    /// The database did not answer; the copy stays as it was.
    pub async fn refresh(&self, store: &Store) -> Result<(), StoreError> {
        let generation = self.issued().generation;
        let rows = store.tokens().await?;
        let before = self.issued().kept.clone();
        let kept = before.next(&rows);
        let is_revoked_here = |row: &&TokenRow| row.revoked_at.is_none() && kept.revoked.contains(&row.id);
        if kept != before
            && let Some(row) = rows.iter().find(is_revoked_here)
        {
            tracing::warn!(
                token = row.name,
                "the database has a revoked token as valid: this node refuses it; revoke it again"
            );
        }
        if self.replace(generation, kept) {
            self.save().await;
        }
        Ok(())
    }

    fn alter(&self, change: impl FnOnce(&mut Kept)) {
        let mut issued = self.issued();
        issued.generation += 1;
        change(&mut issued.kept);
        drop(issued);
        self.inner.changes.send_replace(());
    }

    async fn save(&self) {
        let tokens = self.clone();
        // A failure is in the log.
        let _ = blocking(move || tokens.write_copy()).await;
    }

    /// Returns whether anything changed. A read that began before a local change is dropped: the next one has both.
    fn replace(&self, generation: u64, kept: Kept) -> bool {
        let mut issued = self.issued();
        if issued.generation != generation || issued.kept == kept {
            return false;
        }
        issued.kept = kept;
        drop(issued);
        self.inner.changes.send_replace(());
        true
    }

    fn admin_hash(&self) -> Option<SecretHash> {
        *self.inner.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads `admin.token` on a blocking thread. A missing file, or one without a token, ends the admin token.
    ///
    /// # Errors
    /// The file can't be read now (too many open files, a failing disk). The admin token stays valid.
    async fn reread_admin_token(&self) -> io::Result<()> {
        let path = self.inner.data_dir.join(ADMIN_TOKEN_FILE);
        let reading = tokio::task::spawn_blocking(move || read_admin_token(&path));
        let hash = reading.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))?;
        let before = {
            let mut admin = self.inner.admin.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *admin, hash)
        };
        if before != hash {
            self.inner.changes.send_replace(());
        }
        Ok(())
    }

    fn write_copy(&self) {
        let _writing = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = self.issued().kept.clone();
        if let Err(error) = write_copy(&self.inner.data_dir.join(COPY_FILE), &kept) {
            tracing::warn!(error = %error, "copy of the tokens not written: a restart without the database would use an older one");
        }
    }

    fn issued(&self) -> MutexGuard<'_, Issued> {
        self.inner.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Token {
    /// `None`: a role that this version does not know.
    fn of(row: &TokenRow) -> Option<Self> {
        Some(Self {
            id: row.id,
            name: row.name.as_str().into(),
            role: row.role?,
            hash: row.sha256,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use seawall_proto::time::WallTime;

    use super::*;

    #[test]
    fn first_start_makes_an_admin_token_that_only_the_owner_may_read() {
        let dir = tempfile::tempdir().unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(URL_SAFE_NO_PAD.decode(token.trim()).unwrap().len(), 32);
        assert_eq!(tokens.authenticate(token.trim()).map(|who| who.role), Some(Role::Admin));
        assert_eq!(tokens.authenticate(""), None);
        assert_eq!(tokens.authenticate(&random_secret()), None);
    }

    #[tokio::test]
    async fn a_replaced_or_deleted_admin_token_counts_when_it_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let old = fs::read_to_string(&path).unwrap();
        let new = random_secret();

        fs::write(&path, &new).unwrap();
        tokens.reread_admin_token().await.unwrap();

        assert_eq!(tokens.authenticate(old.trim()), None);
        assert!(tokens.authenticate(&new).is_some());
        fs::remove_file(&path).unwrap();
        tokens.reread_admin_token().await.unwrap();
        assert_eq!(tokens.authenticate(&new), None);
    }

    #[tokio::test]
    async fn an_admin_token_that_can_not_be_read_for_a_moment_stays_valid() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();

        assert!(tokens.reread_admin_token().await.is_err());

        assert!(tokens.authenticate(token.trim()).is_some());
    }

    #[tokio::test]
    async fn each_end_of_a_token_wakes_who_waits_for_changes() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let mut changes = tokens.changes();
        let row = row("ci", Role::Viewer, &random_secret());

        tokens.insert(&row).await;
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        tokens.remove(row.id).await;
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        tokens.reread_admin_token().await.unwrap();
        assert!(!changes.has_changed().unwrap(), "the same file changes nothing");
        fs::write(dir.path().join(ADMIN_TOKEN_FILE), random_secret()).unwrap();
        tokens.reread_admin_token().await.unwrap();
        assert!(changes.has_changed().unwrap());
    }

    #[tokio::test]
    async fn revoked_token_stays_revoked_when_the_database_is_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let secret = random_secret();
        let valid = row("ci", Role::Viewer, &secret);
        let tokens = Tokens::open(dir.path()).unwrap();
        tokens.insert(&valid).await;
        tokens.remove(valid.id).await;

        let restarted = Tokens::open(dir.path()).unwrap();
        let older = restarted.issued().kept.next(&[valid]);

        assert_eq!(older.tokens, []);
        assert_eq!(restarted.authenticate(&secret), None);
    }

    #[test]
    fn remembered_revocations_are_bounded_and_the_newest_stay() {
        let rows: Vec<TokenRow> = (0..2 * REVOKED_MAX)
            .map(|number| TokenRow {
                id: Uuid::from_u128(number as u128),
                revoked_at: Some(WallTime::from_unix_ms(1)),
                ..row("ci", Role::Viewer, "x")
            })
            .collect();

        let kept = Kept::default().next(&rows);

        assert_eq!(kept.revoked.len(), REVOKED_MAX);
        assert_eq!(kept.revoked.last(), Some(&rows[0].id));
        assert_eq!(kept.next(&rows[..1]), kept);
    }

    #[test]
    fn an_admin_token_survives_a_restart_and_half_of_one_stops_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(Tokens::open(dir.path()).unwrap());
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        assert!(tokens.authenticate(token.trim()).is_some());
        fs::write(&path, "").unwrap();
        assert!(matches!(Tokens::open(dir.path()), Err(TokensError::Damaged { .. })));
    }

    #[test]
    fn a_copy_that_can_not_be_kept_leaves_nothing_beside_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COPY_FILE);
        fs::create_dir(&path).unwrap();

        assert!(write_copy(&path, &Kept::default()).is_err());

        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn the_copy_outlives_the_process_and_holds_hashes_only() {
        let dir = tempfile::tempdir().unwrap();
        let secret = random_secret();
        let row = row("ci", Role::Operator, &secret);
        Tokens::open(dir.path()).unwrap().insert(&row).await;

        let tokens = Tokens::open(dir.path()).unwrap();

        let copy = dir.path().join(COPY_FILE);
        assert!(!fs::read_to_string(&copy).unwrap().contains(&secret));
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let who = tokens.authenticate(&secret).unwrap();
        assert_eq!((&*who.name, who.role), ("ci", Role::Operator));
        tokens.remove(row.id).await;
        assert_eq!(tokens.authenticate(&secret), None);
        assert!(Tokens::open(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn damage_of_the_copy_is_described_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COPY_FILE);
        let hash = "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OWFiY2RlZmdoaWo";
        for text in [
            format!("{{\"tokens\":[\"{hash}\"]}}"),
            format!("{{\"tokens\":[{{\"{hash}\":1}}]}}"),
        ] {
            fs::write(&path, text).unwrap();

            let problem = read_copy(&path).unwrap_err().to_string();

            assert!(problem.contains("line 1") && !problem.contains(hash), "{problem}");
        }
    }

    #[tokio::test]
    async fn a_copy_of_a_later_version_is_read_but_for_tokens_of_unknown_roles() {
        let dir = tempfile::tempdir().unwrap();
        let (known, unknown) = (random_secret(), random_secret());
        let hash = |secret: &str| URL_SAFE_NO_PAD.encode(SecretHash::of(secret.as_bytes()).as_bytes());
        let text = format!(
            r#"{{"version":2,"tokens":[
                {{"id":"{}","name":"a","role":"viewer","sha256":"{}","until":7}},
                {{"id":"{}","name":"b","role":"auditor","sha256":"{}"}}]}}"#,
            Uuid::from_u128(1),
            hash(&known),
            Uuid::from_u128(2),
            hash(&unknown)
        );
        fs::write(dir.path().join(COPY_FILE), text).unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        assert_eq!(tokens.authenticate(&known).map(|who| who.role), Some(Role::Viewer));
        assert_eq!(tokens.authenticate(&unknown), None);
    }

    #[tokio::test]
    async fn what_was_read_before_a_revocation_does_not_undo_it() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let secret = random_secret();
        let row = row("ci", Role::Viewer, &secret);
        tokens.insert(&row).await;
        let generation = tokens.issued().generation;

        tokens.remove(row.id).await;

        let read = Kept::default().next(std::slice::from_ref(&row));
        assert!(!tokens.replace(generation, read));
        assert_eq!(tokens.authenticate(&secret), None);
    }

    fn row(name: &str, role: Role, token: &str) -> TokenRow {
        TokenRow {
            id: Uuid::from_u128(7),
            name: name.to_owned(),
            role: Some(role),
            sha256: SecretHash::of(token.as_bytes()),
            created_at: WallTime::from_unix_ms(1),
            revoked_at: None,
        }
    }
}
