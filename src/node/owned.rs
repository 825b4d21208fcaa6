//! Volumes all of which are here: added, opened after a restart, offered to peers. Must not know fetching.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Node;
use super::entry::{Disk, Entry};
use super::inventory::Inventory;
use super::record::{Pace, RecordError, Records, VERSION, VolumeRecord};
use super::refusal::api_error;
use crate::control::{AddVolume, ApiError, ErrorKind};
use crate::core::ids::{Incarnation, Name};
use crate::core::manifest::Geometry;
use crate::handover::{Generation, Held, Left, Machine, State, Verb, adding, may_be_at};
use crate::image::{Identity, Image, ImageError, Mark, Noted, Sameness, Unlinked, Verdict, WhyNot};
use crate::seeded_bugs::{Bug, is_planted};
use crate::source::{Manifest, SourceError, SourceVolume};
use crate::volume::{Volume, WriteObserver};

/// What an image holds that is the one that it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// As far as was noted, what it held.
    AsNoted,
    /// Something else: somebody wrote it while this site did not have it open.
    Another,
}

/// Told of every write to a volume all of which is here: its ids are forgotten, and what it held at rest.
struct Observer {
    manifest: Arc<Manifest>,
    records: Records,
    incarnation: Incarnation,
    /// Whether a mark is noted: looked at by every write.
    is_marked: Arc<AtomicBool>,
}

impl WriteObserver for Observer {
    fn note_write(&self, bytes: std::ops::Range<u64>) -> Result<(), String> {
        if self.is_marked.load(Ordering::Acquire) {
            // Durable before the write. Two at once delete it twice.
            self.records.note_mark(self.incarnation, None).map_err(|error| error.to_string())?;
            self.is_marked.store(false, Ordering::Release);
        }
        self.manifest.note_write(bytes).map_err(|error| error.to_string())
    }
}

impl Node {
    /// Takes an image into ownership.
    pub(super) async fn add_owned(self: &Arc<Self>, add: AddVolume) -> Result<(), ApiError> {
        let _reserved = self.reserve(&add.name)?;
        self.failures.lock().remove(&add.name);
        // First: the lock on the image would only say that somebody has it.
        self.refuse_shared_image(&add.name, &add.image)?;
        let name = add.name.clone();
        let internal = |error: String| ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "");
        let left = self.records.left(&add.name).map_err(|error| internal(error.to_string()))?;
        if let Some(to) = may_be_at(left.as_ref()).filter(|_| !add.again) {
            return Err(ApiError::new(
                ErrorKind::Refused,
                format!("volume {}: a volume of this name left for {to}, and may be written there", add.name),
                "if this image is to be served under the name all the same, say --again",
            ));
        }
        let again = add.again;
        let image = self.run_apart(move || Image::open_best(&add.image)).await.map_err(internal)?;
        let image = image.map_err(|error| ApiError::new(ErrorKind::Invalid, format!("volume {name}: {error}"), ""))?;
        let block_size = u64::from(self.config.store.block_size.bytes());
        let geometry = Geometry::new(image.size_bytes(), block_size)
            .map_err(|error| ApiError::new(ErrorKind::Invalid, format!("volume {name}: {error}"), ""))?;
        self.own(&name, image, geometry, left.as_ref()).await.map_err(internal)?;
        tracing::info!(volume = %name, again, "a volume is served");
        Ok(())
    }
}

impl Inventory {
    /// Serves an image from now on. `left` is what is remembered of an earlier volume of the name; the name is reserved.
    pub async fn own(
        self: &Arc<Self>,
        name: &Name,
        image: Image,
        geometry: Geometry,
        left: Option<&Left>,
    ) -> Result<Arc<Entry>, String> {
        let (site, of, held) = (Arc::clone(self), name.clone(), adding(left));
        let entry = self.run_apart(move || site.make_owned(of, image, geometry, held)).await??;
        let (machine, first) = Machine::restore(entry.record().held);
        entry.start(machine, first);
        entry.custody().settled().await;
        self.volumes.lock().insert(name.clone(), Arc::clone(&entry));
        Ok(entry)
    }

    fn make_owned(
        self: &Arc<Self>,
        name: Name,
        image: Image,
        geometry: Geometry,
        held: Held,
    ) -> Result<Arc<Entry>, String> {
        let record = VolumeRecord {
            version: VERSION,
            name,
            image: image.path().to_owned(),
            geometry,
            incarnation: Incarnation(self.draw()),
            // Another image under the same name must never pass for this one.
            generation: self.draw_generation(),
            held,
            source_generation: None,
            pace: Pace::default(),
            is_made: false,
            is_read_only: false,
            // Without it, whatever lies there after a restart would be taken for it.
            noted: Some(image.identity().map_err(|error| error.to_string())?),
        };
        let entry = self.make_complete(record.clone(), image).map_err(|error| format!("{error:#}"))?;
        self.records.save(&record).map_err(|error| error.to_string())?;
        // Nobody has it yet.
        self.mark(&entry, false, || true);
        if let Some(why) = self.is_read_only(&entry) {
            tracing::warn!(volume = %record.name, why, "the volume is read-only");
        }
        Ok(entry)
    }

    pub(super) fn draw_generation(&self) -> Generation {
        let drawn = self.draw();
        Generation(u64::from_le_bytes(std::array::from_fn(|at| drawn[at])) >> 1)
    }

    /// Brings a journalled volume back. What needs no image goes on without one.
    pub(super) async fn restore(self: &Arc<Self>, record: VolumeRecord) {
        let name = record.name.clone();
        let opened = match &record.held.state {
            State::Asking { .. } => Err(anyhow::anyhow!("the relocation is being withdrawn")),
            _ => {
                let (node, record) = (Arc::clone(self), record.clone());
                let opened = self.run_apart(move || node.open(record)).await;
                opened.unwrap_or_else(|error| Err(anyhow::anyhow!(error)))
            }
        };
        let entry = opened.unwrap_or_else(|error| {
            tracing::error!(volume = %name, error = format!("{error:#}"), "a volume cannot be served; the others are");
            Entry::new(self, record.clone(), Disk::Shut(format!("{error:#}")))
        });
        let (machine, first) = Machine::restore(record.held.clone());
        entry.start(machine, first);
        if let Some(came) = &record.held.came
            && self.records.instance_for(&came.from).is_ok_and(|instance| instance.is_doubted)
        {
            entry.custody().doubt(true);
        }
        entry.custody().settled().await;
        if let Some(why) = self.is_read_only(&entry) {
            tracing::warn!(volume = %name, why, "the volume is read-only");
        }
        self.volumes.lock().insert(name, entry);
    }

    /// Opens what a record speaks of. Blocking.
    fn open(self: &Arc<Self>, mut record: VolumeRecord) -> anyhow::Result<Arc<Entry>> {
        if !record.held.state.is_complete() {
            let entry = self.open_arriving(record)?;
            // It is written from now on.
            let incarnation = entry.record().incarnation;
            if self.records.mark(incarnation)?.is_some() {
                self.records.note_mark(incarnation, None)?;
            }
            return Ok(entry);
        }
        let (image, content) = self.open_known(&mut record)?;
        let is_marked = self.records.mark(record.incarnation)?.is_some();
        let entry = self.make_complete(record, image)?;
        if let (Content::Another, Some(source)) = (content, &*entry.source.lock()) {
            source.manifest.suspect();
        }
        entry.is_marked.store(is_marked, Ordering::Release);
        Ok(entry)
    }

    /// The image of a record, which must be the one that it was. Blocking.
    pub(super) fn open_known(&self, record: &mut VolumeRecord) -> anyhow::Result<(Image, Content)> {
        let outside = self.outside().ok_or_else(|| anyhow::anyhow!("the site is shutting down"))?;
        let image = outside.open_image(record)?;
        let mut content = Content::AsNoted;
        if let Some(identity) = record.noted.as_ref().filter(|_| !is_planted(Bug::ImageByPath)) {
            let noted = Noted { identity: identity.clone(), mark: self.records.mark(record.incarnation)? };
            match image.recognise(&noted) {
                Ok(Verdict::Same) => {}
                // It is the same thing, all of which is the volume's: who wrote it meanwhile may do so. Of a volume that is
                // arriving, what has arrived would not be what the rows say.
                Err(ImageError::NotTheSame { why: WhyNot::OtherContent(None), .. })
                    if record.held.state.is_complete() =>
                {
                    tracing::warn!(volume = %record.name, image = %record.image.display(), "the image was written by somebody else while this site did not have it open");
                    content = Content::Another;
                    // What was announced of a released image stays so; that it is another is to be seen at every start.
                    if record.held.state.is_owner() {
                        self.records.note_mark(record.incarnation, None)?;
                    }
                }
                Err(error) => return Err(error.into()),
                // Samples tell other content, not this one: disks that were made of one template may agree in all of them.
                Ok(Verdict::SameContent(why)) if !record.held.state.is_complete() => {
                    let path = record.image.clone();
                    return Err(ImageError::NotTheSame { path, why: WhyNot::Unproven(why) }.into());
                }
                Ok(Verdict::SameContent(why)) => {
                    self.refuse_image_of_another(record, &image)?;
                    tracing::warn!(volume = %record.name, image = %record.image.display(), why, "the image was moved or copied; it holds what it held");
                }
            }
        }
        let identity = image.identity()?;
        if record.noted.as_ref() != Some(&identity) {
            record.noted = Some(identity);
            self.records.save(record)?;
        }
        Ok((image, content))
    }

    /// What lies at a volume's path must not be what another volume's record speaks of.
    fn refuse_image_of_another(&self, record: &VolumeRecord, image: &Image) -> anyhow::Result<()> {
        let now = image.identity()?;
        for other in self.records.load(&|| Incarnation(self.draw()))? {
            let is_its = |noted: &Identity| matches!(noted.is_same_thing(&now), Sameness::Same);
            if other.name != record.name && other.noted.as_ref().is_some_and(is_its) {
                let path = record.image.clone();
                let why = WhyNot::Another(format!("it is the image of volume {}", other.name));
                return Err(ImageError::NotTheSame { path, why }.into());
            }
        }
        Ok(())
    }

    /// Notes what an image holds that rests, so that another one in its place is noticed; unless, as is asked in the end, it rests no more.
    /// `is_synced`: all that was written is on the disk. Blocking.
    pub(super) fn mark(&self, entry: &Entry, is_synced: bool, still_rests: impl FnOnce() -> bool) {
        let Ok(volume) = entry.volume() else { return };
        let record = entry.record();
        // What is not synced may be gone after a power loss, and the mark would not fit.
        let synced = if volume.image().is_writable() && !is_synced { volume.image().sync_data() } else { Ok(()) };
        let marked = synced.and_then(|()| Mark::take(volume.image(), record.geometry.size_bytes));
        let marked = marked.map_err(|error| error.to_string());
        let noted = marked.and_then(|mark| {
            self.records.note_mark(record.incarnation, Some(&mark)).map_err(|error| error.to_string())
        });
        match noted {
            Ok(()) => {
                entry.is_marked.store(true, Ordering::Release);
                // Whoever wrote since the look at it did not see that there is a mark.
                if !still_rests()
                    && let Err(error) = self.records.note_mark(record.incarnation, None)
                {
                    tracing::warn!(volume = %entry.name, %error, "a mark that may not fit could not be taken back");
                }
            }
            Err(why) => tracing::warn!(volume = %entry.name, why, "what the image holds could not be noted"),
        }
    }
}

impl Node {
    /// Stops serving a volume that nobody depends on. Its image stays.
    pub(super) async fn remove_owned(&self, name: &Name) -> Result<(), ApiError> {
        let custody = self.known(name)?.custody().clone();
        // A task of its own: it ends, whoever waits for it.
        match tokio::spawn(async move { custody.tell(Verb::Remove).await }).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(no)) => Err(api_error(name, &no)),
            Err(error) => Err(ApiError::new(ErrorKind::Internal, error.to_string(), "")),
        }
    }
}

impl Inventory {
    /// A volume all of which is in its image, ready to be a source.
    fn make_complete(self: &Arc<Self>, record: VolumeRecord, image: Image) -> anyhow::Result<Arc<Entry>> {
        // Whether a guest has written since it came decides whether it can be given back.
        let has_way_back = record.held.way_back().is_some();
        let parts = self.parts(&record, image);
        let volume = Arc::new(if has_way_back { Volume::arrived(parts)? } else { Volume::complete(parts) });
        let entry = Entry::new(self, record, Disk::Open(volume, None));
        self.renew_source(&entry)?;
        Ok(entry)
    }

    /// Makes (anew) what peers fetch from, of an image that no guest writes at this moment.
    pub(super) fn renew_source(&self, entry: &Entry) -> Result<(), SourceError> {
        let Ok(volume) = entry.volume() else { return Ok(()) };
        let record = entry.record();
        let image = Arc::clone(volume.image());
        let is_released = matches!(record.held.state, State::Released { .. });
        // Two that keep rows of one image would not see each other's writes.
        if let Some(source) = entry.source.lock().take() {
            source.manifest.close();
        }
        let manifest = Manifest::open(
            record.name,
            record.incarnation,
            image,
            record.geometry,
            Arc::clone(&self.state),
            is_released,
        )?;
        self.set_source(entry, &volume, Arc::new(manifest));
        Ok(())
    }

    /// All of a volume is here now: peers may fetch it, while guests write it. Blocks until the writes that nobody noted have ended: what
    /// was looked at before that would be believed for ever.
    pub(super) fn offer(&self, entry: &Entry) -> Result<(), String> {
        // Two at a time would make two manifests, and guests' writes be noted in one of them.
        let _offering = entry.offering.lock();
        let volume = entry.volume()?;
        volume.finish();
        // Not one expression: the lock would be held while the source is set.
        let kept = entry.source.lock().as_ref().map(|source| Arc::clone(&source.manifest));
        if let Some(manifest) = kept {
            // Of a volume that was a source before, and is one again.
            self.set_source(entry, &volume, manifest);
            return Ok(());
        }
        volume.forget_journal().map_err(|error| error.to_string())?;
        let record = entry.record();
        let image = Arc::clone(volume.image());
        let manifest =
            Manifest::open_written(record.name, record.incarnation, image, record.geometry, Arc::clone(&self.state));
        self.set_source(entry, &volume, Arc::new(manifest.map_err(|error| error.to_string())?));
        if let Some(key) = entry.key() {
            self.fetch.close(key);
        }
        Ok(())
    }

    /// After a change of ownership the generation is another; the manifest is still right, and two that keep rows of
    /// one image would not see each other's writes.
    pub(super) fn renew_generation(&self, entry: &Entry) {
        let kept = entry.source.lock().as_ref().map(|source| Arc::clone(&source.manifest));
        if let (Some(manifest), Ok(volume)) = (kept, entry.volume()) {
            self.set_source(entry, &volume, manifest);
        }
    }

    fn set_source(&self, entry: &Entry, volume: &Volume, manifest: Arc<Manifest>) {
        let record = entry.record();
        let source = Arc::new(SourceVolume {
            name: record.name,
            image: Arc::clone(volume.image()),
            geometry: record.geometry,
            manifest,
            generation: record.generation.0,
        });
        // Before anything is hashed.
        volume.set_observer(Some(Arc::new(Observer {
            manifest: Arc::clone(&source.manifest),
            records: self.records.clone(),
            incarnation: record.incarnation,
            is_marked: Arc::clone(&entry.is_marked),
        })));
        self.hasher.hash_in_background(&source);
        *entry.source.lock() = Some(source);
    }

    /// Whether a guest's write was acknowledged, by what is journalled: of a volume whose image cannot be opened.
    pub(super) fn was_written(&self, record: &VolumeRecord) -> Result<bool, RecordError> {
        Ok(crate::volume::was_written(&*self.state, record.incarnation)?)
    }
}

/// Deletes the file that was made for a volume, and no other that has its name by now.
pub(super) fn delete_made(record: &VolumeRecord, volume: Option<&Volume>) {
    if !record.is_made {
        return;
    }
    let deleted = match (volume, &record.noted) {
        (Some(volume), _) if volume.image().was_made() => volume.image().unlink_if_ours(),
        (_, Some(identity)) => Image::unlink_known(&record.image, identity),
        (_, None) => return,
    };
    match deleted {
        Ok(Unlinked::Done) => {}
        Ok(other) => {
            tracing::warn!(volume = %record.name, image = %record.image.display(), ?other, "the file of a volume that was given up is left over");
        }
        Err(error) => {
            tracing::warn!(volume = %record.name, %error, "the file of a volume that was given up is left over");
        }
    }
}

impl Inventory {
    /// Keeps a name from being taken twice at the same time.
    pub fn reserve(self: &Arc<Self>, name: &Name) -> Result<Reserved, ApiError> {
        if self.entry(name).is_some() || !self.reserved.lock().insert(name.clone()) {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} exists here already"),
                format!("see `blockferry status {name}`; `volume remove` or `cancel` ends it"),
            ));
        }
        // It may have come in between.
        let reserved = Reserved { site: Arc::clone(self), name: name.clone() };
        match self.entry(name) {
            None => Ok(reserved),
            Some(_) => self.reserve(name),
        }
    }
}

impl Node {
    pub(super) fn refuse_shared_image(&self, name: &Name, image: &Path) -> Result<(), ApiError> {
        let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let wanted = canonical(image);
        let entries: Vec<_> = self.volumes.lock().values().cloned().collect();
        for entry in entries {
            if canonical(&entry.record().image) == wanted {
                return Err(ApiError::new(
                    ErrorKind::Conflict,
                    format!("volume {name}: image {} is volume {} already", image.display(), entry.name),
                    "one image is one volume",
                ));
            }
        }
        Ok(())
    }

    /// A volume that has a record here, served or not.
    pub(super) fn known(&self, name: &Name) -> Result<Arc<Entry>, ApiError> {
        self.entry(name).ok_or_else(|| match self.failures.lock().get(name) {
            Some(error) => error.clone(),
            None => ApiError::new(
                ErrorKind::NotFound,
                format!("there is no volume {name} here"),
                "`blockferry volume list` shows what there is",
            ),
        })
    }
}

impl Inventory {
    /// A volume is gone: its name is free.
    pub(super) fn forget(&self, entry: &Arc<Entry>) {
        let mut volumes = self.volumes.lock();
        if volumes.get(&entry.name).is_some_and(|there| Arc::ptr_eq(there, entry)) {
            volumes.remove(&entry.name);
        }
    }

    /// Rows about volumes that no record speaks of: whoever wrote them came too late.
    pub(super) fn forget_strangers(&self, records: &[VolumeRecord]) -> Result<(), RecordError> {
        let known: Vec<Incarnation> = records.iter().map(|record| record.incarnation).collect();
        crate::volume::forget_strangers(&*self.state, &known)?;
        crate::source::forget_strangers(&*self.state, &known)?;
        self.records.forget_marks_but(&known)
    }
}

/// A name that is being worked on.
pub struct Reserved {
    site: Arc<Inventory>,
    name: Name,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.site.reserved.lock().remove(&self.name);
    }
}
