# gnuplot figure-S2-cifar10-k3.gp, in this folder, draws figure-S2-cifar10-k3.svg and figure-S2-cifar10-k3.png.
set datafile separator ','
set key off
do for [format in "svg png"] {
  if (format eq "svg") { set terminal svg size 1300,900 font 'sans,13' background 'white' }
  else { set terminal pngcairo size 1300,900 font 'sans,10' background 'white' }
  set output 'figure-S2-cifar10-k3.'.format
  set border 3
  set tics nomirror
  set grid
  set rmargin 18
  set multiplot layout 2,2 title 'CIFAR-10, kernel 3, 150 epochs'
  unset label
  set title 'Training error, %'
  set xlabel 'epoch'
  set yrange [25.237280000000005:66.56672]
  set label 'SmallNet' at graph 1.02, first 28.55587 textcolor rgb '#000000' noenhanced
  set label 'FC(Arora18)' at graph 1.02, first 30.66061 textcolor rgb '#e69f00' noenhanced
  set label 'ExpandNet-CL' at graph 1.02, first 26.45113 textcolor rgb '#0072b2' noenhanced
  set label 'ExpandNet-CL+FC' at graph 1.02, first 24.34639 textcolor rgb '#56b4e9' noenhanced
  plot 'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:2 with lines linewidth 1.5 linecolor rgb '#000000', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:3 with lines linewidth 1.5 linecolor rgb '#e69f00', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:4 with lines linewidth 1.5 linecolor rgb '#0072b2', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:5 with lines linewidth 1.5 linecolor rgb '#56b4e9'
  unset label
  set title 'Test error, %'
  set xlabel 'epoch'
  set yrange [24.012800000000002:56.3372]
  set label 'SmallNet' at graph 1.02, first 26.660574999999998 textcolor rgb '#000000' noenhanced
  set label 'FC(Arora18)' at graph 1.02, first 28.306724999999997 textcolor rgb '#e69f00' noenhanced
  set label 'ExpandNet-CL' at graph 1.02, first 25.014424999999996 textcolor rgb '#0072b2' noenhanced
  set label 'ExpandNet-CL+FC' at graph 1.02, first 23.368274999999997 textcolor rgb '#56b4e9' noenhanced
  plot 'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:6 with lines linewidth 1.5 linecolor rgb '#000000', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:7 with lines linewidth 1.5 linecolor rgb '#e69f00', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:8 with lines linewidth 1.5 linecolor rgb '#0072b2', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:9 with lines linewidth 1.5 linecolor rgb '#56b4e9'
  unset label
  set title 'Least cosine between gradients of batches'
  set xlabel 'epoch'
  set yrange [-0.5941737690191217:-0.06524751791483901]
  set label 'SmallNet' at graph 1.02, first -0.4445261794651142 textcolor rgb '#000000' noenhanced
  set label 'FC(Arora18)' at graph 1.02, first -0.4714622385491286 textcolor rgb '#e69f00' noenhanced
  set label 'ExpandNet-CL' at graph 1.02, first -0.4175901203810998 textcolor rgb '#0072b2' noenhanced
  set label 'ExpandNet-CL+FC' at graph 1.02, first -0.3906540612970854 textcolor rgb '#56b4e9' noenhanced
  plot 'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:10 with lines linewidth 1.5 linecolor rgb '#000000', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:11 with lines linewidth 1.5 linecolor rgb '#e69f00', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:12 with lines linewidth 1.5 linecolor rgb '#0072b2', \
       'figure-S2-cifar10-k3-curves.csv' skip 1 using 1:13 with lines linewidth 1.5 linecolor rgb '#56b4e9'
  unset label
  set title 'Density of these cosines at the end, labelled at its peak'
  set xlabel 'cosine'
  set yrange [-0.14591003334946653:3.79366086708613]
  set label 'SmallNet' at graph 1.02, first 3.597357286396108 textcolor rgb '#000000' noenhanced
  set label 'FC(Arora18)' at graph 1.02, first 3.3967309905405916 textcolor rgb '#e69f00' noenhanced
  set label 'ExpandNet-CL' at graph 1.02, first 3.797983582251624 textcolor rgb '#0072b2' noenhanced
  set label 'ExpandNet-CL+FC' at graph 1.02, first 3.196104694685075 textcolor rgb '#56b4e9' noenhanced
  plot 'figure-S2-cifar10-k3-density.csv' skip 1 using 1:2 with lines linewidth 1.5 linecolor rgb '#000000', \
       'figure-S2-cifar10-k3-density.csv' skip 1 using 1:3 with lines linewidth 1.5 linecolor rgb '#e69f00', \
       'figure-S2-cifar10-k3-density.csv' skip 1 using 1:4 with lines linewidth 1.5 linecolor rgb '#0072b2', \
       'figure-S2-cifar10-k3-density.csv' skip 1 using 1:5 with lines linewidth 1.5 linecolor rgb '#56b4e9'
  unset multiplot
  unset output
}
