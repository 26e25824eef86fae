//! A window with sliders: samples are drawn anew while they move, a step with each frame.
//!
//! Model, adapters and window share the device. What is on its way to clean digits goes from burn's buffer to the
//! window's texture by a shader, and never to the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use eframe::wgpu;
use egui::{Slider, TextureId, Ui, Vec2};
use loraweld::fusion::{self, KLoraOptions, Schedule};
use loraweld::{Adapter, Control, Projection};

use crate::adapters::{Fused, Live, Rule};
use crate::bench::{by_layer, by_token};
use crate::canvas::{Canvas, paint};
use crate::data::{Data, Noise, PIXELS};
use crate::model::{DigitDit, Fuse, Plain, TOKENS};
use crate::picture;
use crate::run::Run;
use crate::shared::Shared;

/// A column for each digit.
const COLUMNS: usize = 10;
const ROWS: usize = 4;
const STEPS: usize = 25;
const SIZE: [u32; 2] = [920, 390];

/// What can be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Base,
    Sum,
    NpLora,
    KLora,
    Est,
    ByLayer,
    ByToken,
}

const METHODS: [(Method, &str); 7] = [
    (Method::ByToken, "selection by token"),
    (Method::ByLayer, "selection by layer"),
    (Method::NpLora, "NP-LoRA"),
    (Method::KLora, "K-LoRA"),
    (Method::Est, "EST-LoRA"),
    (Method::Sum, "sum"),
    (Method::Base, "no adapter"),
];

/// Where the sliders are.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sliders {
    method: Method,
    heart: f64,
    shade: f64,
    mu: f64,
    temperature: f64,
    seed: u64,
}

/// The model, the adapters, and a run that is on its way.
pub struct Studio {
    shared: Shared,
    model: DigitDit,
    fused: Fused,
    live: Live,
    schedules: [Arc<Schedule>; 2],
    sliders: Sliders,
    run: Run,
    canvas: Canvas,
    /// Share of the tokens that the heart won in the run before; of methods that let them choose.
    won: Option<f64>,
    error: Option<String>,
}

impl Studio {
    /// With content_heart and style_shade.
    pub fn new(shared: Shared, model: DigitDit, data: &Data) -> Result<Self> {
        let (heart, shade): (Adapter, Adapter) =
            (data.adapter("content_heart")?, data.adapter("style_shade")?);
        let (a, b) = (heart.at(1.0), shade.at(1.0));
        let k_lora = fusion::k_lora(a, b, &KLoraOptions::default(), Control::default())?;
        let est = fusion::est(a, b, &Default::default())?;
        let sliders =
            Sliders { method: Method::ByToken, heart: 1.0, shade: 1.0, mu: 0.5, temperature: 1.0, seed: 5 };
        let mut studio = Self {
            fused: Fused::new(&shared, &[a, b], COLUMNS * ROWS * TOKENS, Rule::Always(by_token()))?,
            live: Live::new(&shared, b, a)?,
            schedules: [Arc::new(k_lora), Arc::new(est)],
            run: fresh(&model, sliders.seed),
            canvas: Canvas::new(shared.wgpu().0, [COLUMNS, ROWS]),
            won: None,
            error: None,
            sliders,
            shared,
            model,
        };
        studio.restart()?;
        Ok(studio)
    }

    /// Starts a run with the sliders as they are.
    fn restart(&mut self) -> Result<()> {
        let Sliders { method, heart, shade, mu, temperature, seed } = self.sliders;
        self.fused.selector.set_strength(0, heart)?;
        self.fused.selector.set_strength(1, shade)?;
        self.fused.selector.set_temperature(temperature)?;
        match method {
            Method::Base => {}
            Method::NpLora => self.live.set(Projection::Soft(mu), shade, heart)?,
            Method::Sum => self.fused.rule = Rule::fixed(&[1.0, 1.0]),
            Method::KLora => self.fused.rule = Rule::Scheduled(self.schedules[0].clone()),
            Method::Est => self.fused.rule = Rule::Scheduled(self.schedules[1].clone()),
            Method::ByLayer => self.fused.rule = Rule::Always(by_layer()),
            Method::ByToken => self.fused.rule = Rule::Always(by_token()),
        }
        self.run = fresh(&self.model, seed);
        self.won = None;
        Ok(())
    }

    /// The next step of the run, drawn on the canvas.
    fn advance(&mut self) -> Result<()> {
        if self.run.done() {
            return Ok(());
        }
        let mut plain = Plain;
        let fuse: &mut dyn Fuse = match self.sliders.method {
            Method::Base => &mut plain,
            Method::NpLora => &mut self.live,
            _ => &mut self.fused,
        };
        let clean = self.run.step(&self.model, fuse, None)?;
        let clean = if self.run.done() { self.run.x.clone() } else { clean };
        let view = self.shared.view(&clean)?;
        self.shared.flush()?;
        self.canvas.draw(&self.shared, &view);
        if self.run.done() && matches!(self.sliders.method, Method::ByToken | Method::ByLayer) {
            self.won = Some(self.share()?);
        }
        Ok(())
    }

    /// Share of the tokens of the run that the heart won.
    fn share(&self) -> Result<f64> {
        let decisions = self.fused.selector.decisions()?;
        let calls = STEPS * self.fused.selector.layers().count();
        let last = decisions.iter().rev().take(calls);
        let wins = last.fold([0.0; 2], |[heart, shade], decision| {
            [heart + f64::from(decision.wins[0]), shade + f64::from(decision.wins[1])]
        });
        Ok(wins[0] / (wins[0] + wins[1]))
    }

    /// The window's content; gives whether there is more to come.
    fn show(&mut self, ui: &mut Ui, picture: TextureId) -> bool {
        if let Err(e) = self.advance() {
            self.error = Some(format!("{e:#}"));
        }
        let before = self.sliders;
        egui::Panel::left("sliders").resizable(false).exact_size(250.0).show(ui, |ui| self.controls(ui));
        egui::CentralPanel::default().show(ui, |ui| self.samples(ui, picture));
        if self.sliders != before
            && let Err(e) = self.restart()
        {
            self.error = Some(format!("{e:#}"));
        }
        !self.run.done() && self.error.is_none()
    }

    fn controls(&mut self, ui: &mut Ui) {
        ui.add_space(6.0);
        ui.heading("content_heart + style_shade");
        ui.add_space(6.0);
        let s = &mut self.sliders;
        for (method, name) in METHODS {
            ui.radio_value(&mut s.method, method, name);
        }
        ui.add_space(6.0);
        ui.add(Slider::new(&mut s.heart, 0.0..=2.0).text("heart"));
        ui.add(Slider::new(&mut s.shade, 0.0..=2.0).text("shade"));
        ui.add_enabled(s.method == Method::NpLora, Slider::new(&mut s.mu, 0.0..=10.0).text("mu"));
        let by_score = matches!(s.method, Method::ByToken | Method::ByLayer);
        let temperature = Slider::new(&mut s.temperature, 0.1..=10.0).logarithmic(true).text("temperature");
        ui.add_enabled(by_score, temperature);
        ui.add(Slider::new(&mut s.seed, 0..=99).text("noise"));
        ui.add_space(6.0);
        ui.label(format!("step {} of {STEPS}", self.run.step));
        if let Some(won) = self.won {
            ui.label(format!("the heart won {:.0} % of the tokens", 100.0 * won));
        }
        if let Some(error) = &self.error {
            ui.colored_label(egui::Color32::RED, error);
        }
    }

    fn samples(&mut self, ui: &mut Ui, picture: TextureId) {
        let side = (ui.available_width() / COLUMNS as f32).min((ui.available_height() - 40.0) / ROWS as f32);
        ui.horizontal(|ui| {
            ui.spacing_mut().item_spacing = Vec2::ZERO;
            for digit in 0..COLUMNS {
                let text = egui::RichText::new(digit.to_string()).strong();
                ui.add_sized([side, 20.0], egui::Label::new(text));
            }
        });
        ui.image((picture, Vec2::new(side * COLUMNS as f32, side * ROWS as f32)));
        ui.small(self.shared.loraweld.describe());
    }

    /// Opens the window. With a file, saves what it shows when the first run is through, and closes it.
    pub fn open(self, screenshot: Option<PathBuf>) -> Result<()> {
        let (device, queue) = self.shared.wgpu();
        let lost = || anyhow!("the device was not opened here");
        let setup = egui_wgpu::WgpuSetupExisting {
            instance: self.shared.loraweld.wgpu_instance().ok_or_else(lost)?.clone(),
            adapter: self.shared.loraweld.wgpu_adapter().ok_or_else(lost)?.clone(),
            device: device.clone(),
            queue: queue.clone(),
        };
        let mut options = eframe::NativeOptions {
            viewport: egui::ViewportBuilder::default().with_inner_size([SIZE[0] as f32, SIZE[1] as f32]),
            renderer: eframe::Renderer::Wgpu,
            ..Default::default()
        };
        options.wgpu_options.wgpu_setup = setup.into();
        eframe::run_native(
            "loraweld digits",
            options,
            Box::new(move |context| {
                let state = context.wgpu_render_state.as_ref().ok_or("eframe has no wgpu")?;
                let picture = self.canvas.register(&mut state.renderer.write(), &state.device);
                Ok(Box::new(Window { studio: self, picture, screenshot }))
            }),
        )
        .map_err(|e| anyhow!("the window: {e}"))
    }

    /// Writes what the window would show when the first run is through, without a display.
    pub fn screenshot(mut self, file: &Path) -> Result<()> {
        let (device, queue) = self.shared.wgpu();
        let (device, queue) = (device.clone(), queue.clone());
        let mut renderer =
            egui_wgpu::Renderer::new(&device, wgpu::TextureFormat::Rgba8Unorm, Default::default());
        let picture = self.canvas.register(&mut renderer, &device);
        let context = egui::Context::default();
        let size = Vec2::new(SIZE[0] as f32, SIZE[1] as f32);
        let screen = egui::Rect::from_min_size(egui::Pos2::ZERO, size);
        loop {
            let input = egui::RawInput { screen_rect: Some(screen), ..Default::default() };
            let mut more = false;
            let mut output = context.run_ui(input, |ui| more = self.show(ui, picture));
            for (id, deltas) in output.textures_delta.set.drain() {
                for delta in deltas {
                    renderer.update_texture(&device, &queue, id, &delta);
                }
            }
            // After painting, that is; but only the last frame is painted.
            let unused: Vec<TextureId> = output.textures_delta.free.drain().collect();
            if more {
                unused.iter().for_each(|id| renderer.free_texture(id));
                continue;
            }
            if let Some(error) = self.error {
                return Err(anyhow!(error));
            }
            let triangles = context.tessellate(output.shapes, output.pixels_per_point);
            let pixels = paint(&self.shared, &mut renderer, &triangles, SIZE)?;
            return picture::save(file, SIZE[0] as usize, SIZE[1] as usize, png::ColorType::Rgba, &pixels);
        }
    }
}

fn fresh(model: &DigitDit, seed: u64) -> Run {
    let labels: Vec<usize> = (0..ROWS * COLUMNS).map(|i| i % COLUMNS).collect();
    Run::new(model, &Noise::new(seed).take(labels.len() * PIXELS), &labels, STEPS)
}

/// The window of eframe.
struct Window {
    studio: Studio,
    picture: TextureId,
    screenshot: Option<PathBuf>,
}

impl eframe::App for Window {
    fn ui(&mut self, ui: &mut Ui, _: &mut eframe::Frame) {
        if self.studio.show(ui, self.picture) {
            ui.ctx().request_repaint();
        } else if let Some(file) = self.screenshot.take() {
            let context = ui.ctx().clone();
            ui.ctx().request_screenshot(move |image| {
                let [width, height] = image.size;
                let pixels: Vec<u8> = image.pixels.iter().flat_map(|pixel| pixel.to_array()).collect();
                if let Err(e) = picture::save(&file, width, height, png::ColorType::Rgba, &pixels) {
                    eprintln!("{e:#}");
                }
                context.send_viewport_cmd(egui::ViewportCommand::Close);
            });
        }
    }
}
