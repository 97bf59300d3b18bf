"""The texts of a report's page, in English and Chinese. What the run itself recorded (messages of errors, names, the
text of documents) is shown as it is.

    say = Words("zh")
    say("chain"), say("why.schedule", difference=0.0)
"""

from pipeline.core.errors import UserError

LANGUAGES = ("en", "zh")

# key: (English, Chinese)
WORDS: dict[str, tuple[str, str]] = {
    # ---- sections
    "title": ("Report of {name}", "{name} 训练报告"),
    "title_two": ("{first} and {second} compared", "{first} 与 {second} 对比"),
    "title_sweep": ("Sweep of {name}", "{name} 超参数扫描"),
    "made": ("made {when} by alma {version} from {path}", "由 alma {version} 于 {when} 根据 {path} 生成"),
    "live": ("live: this page is renewed when the run has written something", "实时：训练写入新数据后，本页自动刷新"),
    "chain": ("Chain", "流水线"),
    "normal": ("Is this normal?", "这正常吗？"),
    "data": ("Data", "数据"),
    "tokenizer": ("Tokenizer", "分词器"),
    "curves": ("Curves", "训练曲线"),
    "masks": ("What is trained on", "哪些 token 计入损失"),
    "rollouts": ("Sample answers", "回答样例"),
    "evaluation": ("Evaluation", "评测"),
    "lineage": ("Lineage", "血缘"),
    "cost": ("Time and cost", "耗时与成本"),
    "recipe_differences": ("Recipe", "配方差异"),
    "metric_differences": ("Measured", "指标差异"),
    "alarms": ("Alarms that were raised", "触发的告警"),
    "alarm": ("alarm", "告警"),
    "alarm_count": ("times", "次数"),
    "alarm_steps": ("iterations", "迭代"),
    "alarm_action": ("action", "处理方式"),
    "mark.alarm": ("alarm {name}", "告警 {name}"),
    "shares": ("Tasks and shares, with 95% intervals", "任务与比例（95% 区间）"),
    "interval": ("95% interval", "95% 区间"),
    "sweep_plots": ("Metric over each key", "指标随各键的变化"),
    "sweep_members": ("Members", "各次运行"),
    "sweep_over": ("{metric} over {swept}", "{metric} 随 {swept} 的变化"),
    "run": ("run", "运行"),
    "nothing": ("This run has nothing to show here.", "本次运行没有可展示的内容。"),
    "no_script": (
        "The curves need JavaScript; all numbers of the tables are there without it.",
        "曲线需要 JavaScript；不启用时，表格中的数字仍然完整。",
    ),
    "old_browser": (
        "This browser cannot unpack the drawing library (DecompressionStream); use one from 2023 or later.",
        "当前浏览器无法解压绘图库（DecompressionStream），请使用 2023 年之后的版本。",
    ),
    # ---- chain
    "stage": ("stage", "阶段"),
    "kind": ("kind", "类型"),
    "state": ("state", "状态"),
    "in": ("in", "输入"),
    "out": ("out", "输出"),
    "measured": ("measured", "结果"),
    "time": ("time", "耗时"),
    "started": ("started", "开始"),
    "finished": ("finished", "结束"),
    "resumed": ("resumed", "续训次数"),
    "all": ("all", "合计"),
    "state.done": ("done", "已完成"),
    "state.running": ("running", "运行中"),
    "state.interrupted": ("interrupted", "已中断"),
    "state.failed": ("failed", "失败"),
    "state.stale": ("stale", "已过期"),
    "state.damaged": ("damaged", "已损坏"),
    "state.missing": ("not started", "未开始"),
    "states_note": (
        "States are those of the folder. alma status RECIPE also compares with the recipe and its sources.",
        "状态只依据运行目录。alma status RECIPE 还会与配方及数据源比较。",
    ),
    # ---- normal
    "number": ("number", "指标"),
    "expected": ("expected", "预期范围"),
    "verdict": ("", ""),
    "verdict.inside": ("normal", "正常"),
    "verdict.outside": ("look here", "请留意"),
    "verdict.unknown": ("not measured", "未测量"),
    "why": ("why", "依据"),
    "source": ("source", "来源"),
    "normal_note": (
        "Bands are computed from this run's model and recipe, or published. Outside of one is a place to look, not an"
        " error; inside of all of them a run can still be bad.",
        "范围由本次运行的模型与配方算出，或取自公开文献。超出范围只表示值得检查，并不等于出错；全部在范围内也不保证训练得好。",
    ),
    "what.first_loss": ("first loss", "初始损失"),
    "why.first_loss": (
        "A model that has learned nothing gives each of {vocab:,} tokens the same probability: ln {vocab} ="
        " {uniform:.2f} nats. Random layers add up to about {spread:.2f}.",
        "未经训练的模型对 {vocab:,} 个 token 给出相同概率：ln {vocab} = {uniform:.2f} nat；"
        "随机初始化的各层最多再增加约 {spread:.2f}。",
    ),
    "what.first_loss_trained": ("first loss", "初始损失"),
    "why.first_loss_trained": (
        "A trained model is better than guessing, which costs ln {vocab} = {uniform:.2f} nats. Above it, the tokenizer"
        " or chat template is not the model's, or the model was hardly trained.",
        "训练过的模型应优于随机猜测（ln {vocab} = {uniform:.2f} nat）。"
        "高于此值通常说明分词器或对话模板与模型不匹配，或模型几乎未经训练。",
    ),
    "what.first_loss_dpo": ("first loss", "初始损失"),
    "why.first_loss_dpo": (
        "The policy begins as its own reference, so every margin is 0 and the loss is ln 2 = 0.693.",
        "策略模型与参考模型起点相同，奖励差为 0，损失应为 ln 2 = 0.693。",
    ),
    "what.first_loss_reward": ("first loss", "初始损失"),
    "why.first_loss_reward": (
        "Undecided between two answers, a reward model has the loss ln 2 = 0.693.",
        "奖励模型起初无法区分两个回答，损失约为 ln 2 = 0.693。",
    ),
    "what.final_loss": ("final held-out loss", "最终验证损失"),
    "why.final_loss": (
        "Two published fits for {size:.3g} parameters and {tokens:.3g} tokens, plus and minus 15% because tokenizer and"
        " text differ from theirs.",
        "两个公开的缩放律拟合在 {size:.3g} 参数、{tokens:.3g} token 处的预测；因分词器与语料不同，各放宽 15%。",
    ),
    "what.schedule": ("learning rate against the recipe", "学习率与配方的偏差"),
    "why.schedule": (
        "The logged rate is the one that the recipe plans for each step; largest difference as a share of the peak.",
        "记录的学习率应与配方逐步一致；此处为相对峰值的最大偏差。",
    ),
    "what.gradients": ("median gradient norm, second half", "梯度范数中位数（后半程）"),
    "why.gradients": (
        "Clipping at {limit:g} is for rare large gradients. {share:.0%} of the logged steps were above it. If most are,"
        " the limit sets the step size instead of the learning rate.",
        "{limit:g} 的裁剪阈值只针对偶发的大梯度；记录的步中有 {share:.0%} 超过它。"
        "若多数步都被裁剪，实际步长由阈值而非学习率决定。",
    ),
    "what.spikes": ("spikes of the loss", "损失尖峰次数"),
    "why.spikes": (
        "Logged losses more than 6 robust deviations above the median of 128 before them, and steps that were not"
        " applied.",
        "比此前 128 个值的中位数高出 6 个稳健标准差以上的损失，以及未应用的更新。",
    ),
    "what.throughput": ("slow steps: 10% quantile by median speed", "慢步：速度 10% 分位数 / 中位数"),
    "why.throughput": (
        "A steady run has the same speed throughout. Lower: data that are waited for, another job on the machine, a"
        " slow disk.",
        "稳定的训练速度基本不变。偏低常见于等待数据、机器上有其他任务或磁盘过慢。",
    ),
    "what.eos": ("answers that end their turn", "正常结束回合的回答比例"),
    "why.eos": (
        "After SFT nearly every answer should end by itself ({answered} were generated; 95% interval shown). If not,"
        " the end-of-turn token carries no loss, answers are cut off by max_new_tokens, or training was short.",
        "SFT 之后几乎所有回答都应自行结束（共生成 {answered} 条，附 95% 区间）。"
        "否则可能是结束符未计入损失、回答被 max_new_tokens 截断，或训练不足。",
    ),
    "what.kl": ("KL to the reference, per response", "与参考模型的 KL（每条回答）"),
    "why.kl": (
        "Around {target:g} nats per response are the usual target. Far above twice that, the policy leaves the text"
        " that the reward model knows. Negative: the two models are not measured alike.",
        "通常目标约为每条回答 {target:g} nat。远超其两倍时，策略已离开奖励模型熟悉的文本；"
        "为负则说明两个模型的度量方式不一致。",
    ),
    "what.first_ratio": ("approximate KL before the first update", "首次更新前的近似 KL"),
    "why.first_ratio": (
        "The first minibatch meets the weights that sampled it, so it is 0 up to rounding, or the two log-probabilities"
        " are computed differently.",
        "首个小批次所用权重与采样时相同，应为 0（仅舍入误差）；否则说明两处对数概率的计算不一致。",
    ),
    "what.sampler": ("largest difference of sampler and trainer", "采样器与训练器的最大差异"),
    "why.sampler": (
        "Log-probabilities of the same tokens. Above 0.1 the policy is trained on samples of another model.",
        "同一批 token 的对数概率之差。超过 0.1 等于在用另一个模型的样本训练。",
    ),
    "what.approx_kl": ("approximate KL of an update", "单次更新的近似 KL"),
    "why.approx_kl": (
        "Usual limits of one update are 0.01 to 0.05 nats per token.",
        "单次更新的常用上限为每 token 0.01 到 0.05 nat。",
    ),
    "what.ratio": ("mean probability ratio", "概率比均值"),
    "why.ratio": (
        "It stays near 1; 2 or 0.1 mean updates that are too large.",
        "应在 1 附近；达到 2 或 0.1 说明更新过大。",
    ),
    "what.entropy": ("entropy per token", "每 token 熵"),
    "why.entropy": (
        "It began at {first:.2f} nats. Below a tenth of that the policy repeats itself and explores no more; above ln V"
        " is impossible.",
        "起始为 {first:.2f} nat。低于其十分之一时策略几乎不再探索（熵坍缩）；不可能高于 ln V。",
    ),
    "what.policy_eos": ("responses that end by themselves", "自行结束的回答比例"),
    "why.policy_eos": (
        "A response that is cut off is scored at an arbitrary place. Raise max_new_tokens or missing_eos_penalty.",
        "被截断的回答会在任意位置打分。可增大 max_new_tokens 或 missing_eos_penalty。",
    ),
    "what.critic": ("explained variance of the value model", "价值模型的解释方差"),
    "why.critic": (
        "By definition 1 is perfect, and below 0 a constant would predict the returns better.",
        "按定义，1 为完美；低于 0 时还不如常数预测。",
    ),
    # ---- data
    "funnel_of": ("From raw to published: {stage}", "从原始数据到发布：{stage}"),
    "records_of": ("From records to rows: {stage}", "从记录到训练样本：{stage}"),
    "step.read": ("read", "读入"),
    "step.not selected": ("not selected", "未选中"),
    "step.bad": ("bad input", "损坏"),
    "step.filtered": ("filtered", "规则过滤"),
    "step.duplicates": ("duplicates", "重复"),
    "step.dropped": ("dropped", "丢弃"),
    "step.train": ("train", "训练"),
    "step.heldout": ("held out", "留出"),
    "reason": ("reason", "原因"),
    "documents": ("documents", "文档数"),
    "records": ("records", "记录数"),
    "samples_of_dropped": ("samples of what was dropped", "被丢弃内容的样例"),
    "kept_instead": ("kept for it", "保留的是"),
    "value": ("value", "数值"),
    "place": ("place", "位置"),
    "no_report": ("its report.json cannot be read", "无法读取其 report.json"),
    # ---- tokenizer
    "bytes_per_token": ("bytes per token", "每 token 字节数"),
    "characters_per_token": ("characters per token", "每 token 字符数"),
    "vocab_size": ("vocabulary", "词表大小"),
    "round_trip": ("round trip exact", "往返一致"),
    "held_out_text": ("on held-out text", "在留出文本上"),
    # ---- curves
    "step": ("step", "步"),
    "chart.loss": ("loss", "损失"),
    "chart.loss_sources": ("loss by source", "各来源损失"),
    "chart.bits": ("bits per byte", "每字节比特数"),
    "chart.lr": ("learning rate", "学习率"),
    "chart.grad": ("gradient norm", "梯度范数"),
    "chart.speed": ("throughput", "吞吐"),
    "chart.accuracy": ("shares", "比例"),
    "chart.margin": ("margins and rewards of pairs", "成对回答的奖励与差值"),
    "chart.reward": ("reward", "奖励"),
    "chart.kl": ("KL to the reference", "与参考模型的 KL"),
    "chart.entropy": ("entropy", "熵"),
    "chart.update": ("updates of the policy", "策略更新"),
    "chart.value": ("value model", "价值模型"),
    "chart.length": ("response length", "回答长度"),
    "planned": ("planned by the recipe", "配方计划"),
    "mark.resumed": ("resumed", "续训"),
    "mark.spike": ("spike", "尖峰"),
    "mark.refused": ("not applied", "未应用"),
    "mark.rollback": ("rolled back", "回滚"),
    "mark.checkpoint": ("evaluation", "评测"),
    "clip_limit": ("clipped above", "裁剪阈值"),
    "normal_band": ("normal", "正常范围"),
    "thinned": (
        "{rows:,} lines of metrics.jsonl; each curve has at most {most} points and keeps every stretch's extremes",
        "metrics.jsonl 共 {rows:,} 行；每条曲线最多 {most} 个点，并保留各段的极值",
    ),
    "unreadable": ("{count:,} lines could not be read", "{count:,} 行无法解析"),
    "resumes_unknown": ("resumed {count} times; where is not recorded", "续训 {count} 次；未记录具体位置"),
    # ---- rollouts
    "token_by_token": ("Token by token: {stage}", "逐 token 查看：{stage}"),
    "token_by_token_note": (
        "Responses of the first and of the last iteration that was written. Green is positive and red negative, by the"
        " square root of the size in relation to the largest number shown. The score of a response is in the reward of"
        " its last token. Point at a token for its numbers.",
        "取自最早与最近一次有记录的迭代。绿色为正、红色为负，深浅取绝对值与所示最大值之比的平方根。"
        "整条回答的得分计入最后一个 token 的奖励。鼠标停在 token 上可查看数值。",
    ),
    "token.reward": ("reward", "奖励"),
    "token.value": ("value", "价值"),
    "token.kl": ("KL", "KL"),
    "token.advantage": ("advantage", "优势"),
    "token.logprob": ("log-probability", "对数概率"),
    "iteration": ("iteration", "迭代"),
    "token_count": ("{count:,} tokens", "{count:,} 个 token"),
    "ended": ("ended by itself", "自行结束"),
    "cut_off": ("cut off", "被截断"),
    "numbers": ("numbers", "数值"),
    # ---- masks
    "masks_note": (
        "The first records of each source as the stage reads them. Underlined tokens carry loss; colors say whose"
        " message a token is from.",
        "各来源最前面的记录，与训练读取时一致。带下划线的 token 计入损失，颜色表示所属消息的角色。",
    ),
    "role.system": ("system", "系统"),
    "role.user": ("user", "用户"),
    "role.assistant": ("assistant", "助手"),
    "role.tool": ("tool", "工具"),
    "role.template": ("template", "模板"),
    "tokens_with_loss": ("{trained} of {count} tokens carry loss", "{count} 个 token 中有 {trained} 个计入损失"),
    "more_tokens": ("{count} more tokens", "另有 {count} 个 token"),
    "not_here": ("the records of {source} are not on this machine", "来源 {source} 的记录不在本机"),
    "masks_unavailable": ("not shown: {reason}", "未展示：{reason}"),
    # ---- answers
    "prompt": ("prompt", "提示"),
    "answer": ("known answer", "参考答案"),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    "reward": ("reward", "奖励"),
    # ---- evaluation
    "before_after": ("before and after", "训练前后"),
    "change_interval": ("95% interval", "95% 区间"),
    "models": ("models", "模型"),
    "model": ("model", "模型"),
    "win_rate": ("win rate", "胜率"),
    "comparison": ("comparison", "对比"),
    "prompts": ("prompts", "提示数"),
    "warnings": ("warnings of the run", "运行给出的警告"),
    # ---- lineage
    "fingerprint": ("fingerprint", "指纹"),
    "digest": ("content", "内容摘要"),
    "made_from": ("made from", "来自"),
    "software": ("software", "软件版本"),
    "is_current": ("current", "一致"),
    "is_other": ("another result now", "现已变更"),
    "is_external": ("from outside", "外部"),
    # ---- cost
    "processes": ("processes", "进程数"),
    "process_hours": ("process hours", "进程小时"),
    "flops": ("FLOPs", "FLOPs"),
    "peak_memory": ("peak memory", "峰值内存"),
    "price": ("cost at {price:g} per process hour", "按每进程小时 {price:g} 计的成本"),
    "energy": ("energy at {watts:g} W per process", "按每进程 {watts:g} W 计的能耗"),
    "cost_note": (
        "Time is what each stage recorded, killed runs included. alma measures neither money nor energy: give --price"
        " (per process hour) and --watts (per process) to have them computed from the time.",
        "耗时为各阶段的记录，包含被中断的部分。alma 不测量费用与能耗："
        "可用 --price（每进程小时）与 --watts（每进程）由耗时推算。",
    ),
    "assumed_note": (
        "Computed from the recorded time and the figures given on the command line; nothing was metered.",
        "由记录的耗时与命令行给出的数值推算，并非实测。",
    ),
    # ---- comparing
    "key": ("key", "键"),
    "difference": ("difference", "差异"),
    "same_recipe": ("The recorded configurations are the same.", "记录的配置相同。"),
    "only_in": ("only in {run}", "仅 {run} 有"),
}


class Words:
    """Texts in one language. Raises UserError for a language that there is none of."""

    def __init__(self, language: str):
        if language not in LANGUAGES:
            raise UserError(f"--lang {language}: expected one of {', '.join(LANGUAGES)}")
        self.language = language

    def __call__(self, key: str, **values) -> str:
        return WORDS[key][LANGUAGES.index(self.language)].format(**values)

    def get(self, key: str, default: str) -> str:
        """As `say(key)`, or `default` where there is no such text: for names that come from a run."""
        return self(key) if key in WORDS else default
